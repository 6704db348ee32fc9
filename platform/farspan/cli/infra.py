"""`farspan infra`: files out of a spec, and every check that needs no cloud."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Annotated, Any

import typer

from farspan.cli.cluster import Json, Overrides, Spec, load_spec, report
from farspan.errors import ConfigError, NotFoundError

app = typer.Typer(help="Launcher files, Kubernetes manifests, certificates.", no_args_is_help=True)

_KUSTOMIZE_TIMEOUT_S = 120.0


@app.command()
def render(
    spec: Spec = None,
    overrides: Overrides = None,
    root: Annotated[str, typer.Option(help="Folder ray_cluster.yaml and infra/ are written to.")] = ".",
    check: Annotated[bool, typer.Option("--check", help="Write nothing; exit code 1 where a file differs.")] = False,
    as_json: Json = False,
) -> None:
    """Write ray_cluster.yaml, infra/clusters and infra/k8s from a spec."""
    from farspan.cluster.tree import render_tree, stale_files, write_tree

    files = render_tree(load_spec(spec, overrides))
    changed = stale_files(files, Path(root)) if check else write_tree(files, Path(root))
    if as_json:
        typer.echo(json.dumps({"files": sorted(files), "differ" if check else "written": changed}, indent=1))
    else:
        for path in changed:
            typer.echo(f"{'differs' if check else 'written'}: {path}")
        typer.echo(f"{len(files)} files, {len(changed)} {'differ' if check else 'written'}")
    if check and changed:
        raise typer.Exit(1)


@app.command()
def validate(
    folder: Annotated[str, typer.Argument(help="Tree that `farspan infra render` wrote.")] = "infra/k8s",
    crds: Annotated[
        str | None,
        typer.Option(help="KubeRay's CRDs (file or folder): manifests are then held against them, strictly."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Hold manifests against our rules and, with --crds, KubeRay's schemas; exit code 2: there are problems."""
    from farspan.cluster.policy import manifest_problems
    from farspan.cluster.schemas import read_schemas, schema_problems

    schemas = read_schemas(Path(crds)) if crds is not None else {}
    if crds is not None and not any(kind.startswith("Ray") for kind in schemas):
        way_out = "make it by kubectl get crd rayclusters.ray.io rayjobs.ray.io rayservices.ray.io -o json"
        raise ConfigError("--crds", "must hold CRDs of KubeRay", crds, way_out)
    composed, found = _composed(Path(folder)), {}
    for name, manifests in composed.items():
        strict = [problem for manifest in manifests for problem in schema_problems(manifest, schemas)]
        found[name] = [*manifest_problems(manifests), *strict]
    if crds is None:
        typer.echo("not checked against KubeRay's schemas: give --crds", err=True)
    _tell_examples(composed)
    report(found, as_json=as_json)


@app.command()
def certs(
    output: Annotated[str, typer.Argument(help="Folder, made with mode 700.", metavar="FOLDER")],
    host: Annotated[
        list[str] | None, typer.Option(help="Address, network (10.0.0.0/26) or name of nodes; once for each.")
    ] = None,
    days: Annotated[int, typer.Option(help="How long the node's certificate is good for.")] = 365,
) -> None:
    """Make certificates for TLS between Ray's processes; a second call keeps the authority and signs anew."""
    from farspan.cluster.certs import make_certificates
    from farspan.cluster.environment import tls_switches

    folder = Path(output).absolute()
    for path in make_certificates(folder, host or [], days):
        typer.echo(f"written: {path}")
    typer.echo(f"launcher clusters: set tls_folder={folder} in the spec, and every node gets them")
    typer.echo("any other node or driver needs the folder without ca.key, and these variables:")
    for name, value in tls_switches(str(folder)).items():
        typer.echo(f"export {name}={value}")


def _composed(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Each overlay as kustomize composes it; without kubectl the base alone, and that is said."""
    overlays = sorted(file.parent for file in folder.glob("overlays/*/kustomization.yaml"))
    if not overlays:
        raise NotFoundError(str(folder), "no overlays/NAME/kustomization.yaml in it; run farspan infra render")
    if shutil.which("kubectl") is None:
        typer.echo("kubectl is not installed: the base was checked, the overlays were not composed", err=True)
        files = [file for file in folder.glob("base/*/*.yaml") if file.name != "kustomization.yaml"]
        return {"base": [document for file in sorted(files) for document in _documents(file.read_text(), str(file))]}
    return {str(overlay): _documents(_kustomize(overlay), str(overlay)) for overlay in overlays}


def _tell_examples(composed: dict[str, list[dict[str, Any]]]) -> None:
    """Name the values of the committed spec that are still in it: nodes could not pull or read them."""
    from farspan.cluster.examples import examples_in

    for field, value in examples_in(list(composed.values())).items():
        way_out = f"before you apply, render yours with {field}=..."
        typer.echo(f"warning: {field}: {value} is only an example; {way_out}", err=True)


def _kustomize(overlay: Path) -> str:
    command = ["kubectl", "kustomize", str(overlay)]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=_KUSTOMIZE_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        raise ConfigError(str(overlay), "must be composed in time", _KUSTOMIZE_TIMEOUT_S, "look for a cycle") from None
    if answer.returncode != 0:
        raise ConfigError(
            str(overlay), "must be a kustomization", _last_cause(answer.stderr), "run farspan infra render again"
        )
    return answer.stdout


def _last_cause(said: str) -> str:
    """The end of kustomize's chain of causes: which file, and what is wrong with it."""
    return ": ".join(" ".join(said.split()).strip("\"' ").split(": ")[-2:])


def _documents(text: str, name: str) -> list[dict[str, Any]]:
    import yaml

    try:
        found = [document for document in yaml.safe_load_all(text) if document]
    except yaml.YAMLError as problem:
        raise ConfigError(name, "must be YAML", " ".join(str(problem).split()), "fix the syntax") from None
    for document in found:
        if not isinstance(document, dict):
            raise ConfigError(name, "must hold manifests", type(document).__name__, "start with apiVersion")
    return found
