output "cluster_name" {
  description = "For aws eks update-kubeconfig --name."
  value       = aws_eks_cluster.this.name
}

output "bucket" {
  description = "Corpora, checkpoints and models: s3://BUCKET/..."
  value       = aws_s3_bucket.this.bucket
}

output "registry" {
  description = "Push the image of infra/docker here, then set kubernetes.image."
  value       = aws_ecr_repository.this.repository_url
}

output "private_subnet" {
  description = "aws.subnet of the spec, for Ray's cluster launcher in the same network."
  value       = aws_subnet.private[var.zones[0]].id
}

output "instance_profile" {
  description = "aws.instance_profile of the spec: of the head of Ray's cluster launcher. The spec's `name` must be in launcher_clusters."
  value       = aws_iam_instance_profile.launched["head"].name
}

output "worker_instance_profile" {
  description = "aws.worker_instance_profile of the spec: of every other node. The spec's `name` must be in launcher_clusters."
  value       = aws_iam_instance_profile.launched["worker"].name
}
