"""What a user can set of a cluster: one file from which the launcher files and the Kubernetes manifests are rendered.

Torch-free and Ray-free. Secrets have no field here: files and manifests only say where they lie.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING


@dataclass(kw_only=True)
class NodesConfig:
    """One kind of node."""

    aws: str = MISSING
    """EC2 instance type."""
    gcp: str = MISSING
    """Compute Engine machine type."""
    cpus: int = MISSING
    """CPUs a node offers to tasks; 0 on the head, whose memory must not be eaten by one."""
    gpus: int = 0
    """GPUs of a node."""
    memory_gib: int = MISSING
    """Memory of a pod of this kind, on Kubernetes."""
    disk_gib: int = 200
    """Root disk of a node."""
    min_nodes: int = 0
    """Nodes that are kept while nobody needs them."""
    max_nodes: int = 1
    """Most nodes."""
    spot: bool = False
    """Cheaper nodes that the cloud may take back with a notice of two minutes."""
    idle_minutes: int = 10
    """A node that nobody used for so long is deleted."""
    price_per_hour: float = 0.0
    """What one node costs, in `currency`; 0: not known, and `farspan cluster plan` says so."""


@dataclass(kw_only=True)
class SoftwareConfig:
    """Exact versions a node installs, those of requirements.lock."""

    farspan: str = MISSING
    """Version of the wheel in dist/."""
    ray: str = MISSING
    """Must be the version of the machine that talks to the cluster."""
    torch: str = MISSING
    """For GPUs; the build without CUDA counts as the same version."""
    transformers: str = MISSING
    """Whose models farspan runs."""
    nixl: str = MISSING
    """What moves KV pages between nodes."""
    boto3: str = MISSING
    """On the head on AWS, whose autoscaler talks to EC2."""
    google_api: str = MISSING
    """google-api-python-client, on the head on Google Cloud."""


@dataclass(kw_only=True)
class AwsConfig:
    """AWS. The ids made of zeros are yours to fill in: EC2 refuses zeros."""

    region: str = "us-east-1"
    """Where the cluster runs."""
    zone: str = "us-east-1a"
    """One zone: KV pages and gradients stay on its network."""
    account: str = "000000000000"
    """Account that owns the instance profiles."""
    image: str = "ami-00000000000000000"
    """Ubuntu 24.04 with an NVIDIA driver that runs CUDA 13 on GPU types."""
    subnet: str = "subnet-00000000000000000"
    """With a way out to a package index, and reachable from where you type."""
    security_group: str = "sg-00000000000000000"
    """All TCP from itself, port 22 from where you type, nothing else."""
    instance_profile: str = "farspan-head"
    """Role of the head, which starts and ends machines."""
    worker_instance_profile: str = "farspan-worker"
    """Role of every other node, which may read and write your buckets and nothing of EC2; never the head's."""
    key_name: str = "farspan"
    """EC2 key pair."""
    ssh_user: str = "ubuntu"
    """User of the image."""
    ssh_private_key: str = "~/.ssh/farspan.pem"
    """Private half of the key pair, on this machine."""


@dataclass(kw_only=True)
class GcpConfig:
    """Google Cloud. Project and subnet are yours to fill in."""

    project: str = "your-project"
    """Project id."""
    region: str = "us-central1"
    """Where the cluster runs."""
    zone: str = "us-central1-a"
    """One zone."""
    image: str = "projects/your-project/global/images/farspan-node"
    """Ubuntu 24.04 with an NVIDIA driver."""
    subnet: str = "farspan"
    """Subnetwork of the region; nodes get no public address."""
    service_account: str = "farspan-head"
    """Account of the head in the project, without what follows the @; it starts and ends machines."""
    worker_service_account: str = "farspan-worker"
    """Account of every other node, which may start no machine; never the head's."""
    ssh_user: str = "ubuntu"
    """User whose public key is in the project's metadata."""
    ssh_private_key: str = "~/.ssh/farspan.pem"
    """Private half of it, on this machine."""


@dataclass(kw_only=True)
class LocalConfig:
    """Machines that are there already, reached by SSH."""

    head: str = "127.0.0.1"
    """Address of the head, as the other machines see it."""
    workers: list[str] = field(default_factory=list)
    """Addresses of the other machines."""
    ssh_user: str = "ubuntu"
    """User on all of them, who may use sudo."""
    ssh_private_key: str = "~/.ssh/farspan.pem"
    """Private key for it, on this machine."""


@dataclass(kw_only=True)
class HereConfig:
    """Several nodes of Ray on this machine alone, to try everything out; they listen on loopback."""

    workers: int = 2
    """Nodes beside the head."""
    cpus: int = 2
    """CPUs each of them offers to tasks, whatever this machine has."""
    object_store_mib: int = 256
    """Memory of each node for objects."""
    port: int = 6379
    """Of Ray's head."""
    dashboard_port: int = 8265
    """Of the dashboard and the jobs API."""


@dataclass(kw_only=True)
class KubernetesConfig:
    """KubeRay 1.7. Secrets are named, never written."""

    namespace: str = "farspan"
    """Where everything lives; it enforces the restricted pod security standard."""
    image: str = "registry.example.com/farspan:0.1.0"
    """Image of infra/docker, for GPUs; a tag or digest of your registry, never `latest`."""
    cpu_image: str = "registry.example.com/farspan:0.1.0-cpu"
    """The same without CUDA."""
    token_secret: str = "farspan-ray-token"
    """Secret whose key auth_token is Ray's token."""
    api_key_secret: str = "farspan-api-keys"
    """Secret whose key api_keys holds the endpoint's keys, one a line."""
    redis_address: str = "redis.farspan-redis.svc:6379"
    """Component gcs-ft-redis: where the head's state lies."""
    redis_secret: str = "farspan-redis"
    """Its secret with the key password."""
    storage_class: str = "gp3"
    """Component gcs-ft-rocksdb: class of the volume that holds the head's state."""
    queue: str = "farspan"
    """Component kueue: the local queue jobs wait in."""
    train_config: str = "/etc/farspan/train/run.yaml"
    """Run config of the training job, in its ConfigMap farspan-train."""
    model: str = "s3://your-bucket/model"
    """What the service serves and the training job begins with."""
    corpus: str = "s3://your-bucket/corpus"
    """What the training job reads."""
    runs: str = "s3://your-bucket/runs"
    """Where the training job writes, into a folder of its name."""


@dataclass(kw_only=True)
class ClusterSpec:
    """`farspan infra render`, `farspan cluster`."""

    name: str = "farspan"
    """Name of the cluster, and of its nodes' tags."""
    currency: str = "USD"
    """Of the prices below."""
    up_timeout_s: float = 1800.0
    """`farspan cluster up` gives up after so long, where `ray up` would retry for ever."""
    environment: str | None = None
    """Folder of a Python environment that the machines' image holds, with farspan and the versions below: nothing is
    then downloaded, each node's own stands on it. None: each node makes one with pip."""
    tls_folder: str | None = None
    """Folder that `farspan infra certs` made, on this machine: launcher files then send its certificates to every node,
    and Ray's processes speak TLS. None: they do not."""
    head: NodesConfig = field(default_factory=NodesConfig)
    cpu: NodesConfig = field(default_factory=NodesConfig)
    train: NodesConfig = field(default_factory=NodesConfig)
    prefill: NodesConfig = field(default_factory=NodesConfig)
    decode: NodesConfig = field(default_factory=NodesConfig)
    software: SoftwareConfig = field(default_factory=SoftwareConfig)
    aws: AwsConfig = field(default_factory=AwsConfig)
    gcp: GcpConfig = field(default_factory=GcpConfig)
    local: LocalConfig = field(default_factory=LocalConfig)
    here: HereConfig = field(default_factory=HereConfig)
    kubernetes: KubernetesConfig = field(default_factory=KubernetesConfig)
