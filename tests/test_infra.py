"""infra/ holds together: what needs a cluster to run is linted, rendered, parsed and cross-checked."""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from functools import cache
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import command_lines
import kubernetes_models
import promql_parser
import pytest
import yaml
from check_jsonschema.builtin_schemas import get_builtin_schema
from jsonschema import validate

from flows import serve
from flows.calibrations import load_calibration
from flows.planning import plan_of
from flows.presets import load_build
from flows.words import size_text
from negfacediff_core.config import ExecutionConfig

ROOT = Path(__file__).parent.parent
INFRA = ROOT / "infra"
SCRIPTS = sorted([*INFRA.glob("slurm/*.sh"), *INFRA.glob("slurm/*.sbatch")])
OVERLAYS = sorted(path.parent for path in INFRA.glob("kubernetes/overlays/*/kustomization.yaml"))
COMPOSE = yaml.safe_load((INFRA / "compose.yaml").read_text())
SERVICES = COMPOSE["services"]
DASHBOARD = json.loads((INFRA / "grafana/dashboards/negfacediff.json").read_text())
TOOLS = Path(sys.executable).parent  # where pip puts the linters
CONSOLE = re.compile(r"```console\n(.*?)```", flags=re.S)  # blocks of a page
TEXTS = [path for path in sorted(INFRA.rglob("*")) if path.is_file() and path.suffix not in (".pyc", ".json")]


def linted(*command):
    done = subprocess.run([str(word) for word in command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


# -- the image


@pytest.mark.parametrize("name", ["Dockerfile", "weights.Dockerfile"])
def test_a_container_file_passes_its_linter(name):
    linted(TOOLS / "hadolint", "--no-color", INFRA / name)


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_a_target_installs_by_the_constraints_and_runs_as_nobody_special(target):
    stages = re.split(r"^FROM ", (INFRA / "Dockerfile").read_text(), flags=re.M)
    (stage,) = [text for text in stages if re.match(rf"base AS {target}\n", text)]
    assert "--constraint constraints.txt" in stage
    assert re.findall(r"^(?:RUN|COPY|USER) .*", stage, flags=re.M)[-1] == "USER 10001"


def test_the_image_gets_every_package_and_file_that_the_project_installs():
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    sent = {line[1:] for line in lines if line.startswith("!")}
    assert all((ROOT / path).exists() for path in sent)
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests", "benchmarks"}
    copied = re.findall(r"^COPY (.+) \./$", (INFRA / "Dockerfile").read_text(), flags=re.M)
    assert packages | {"packs"} | {name for line in copied for name in line.split()} <= sent


@pytest.mark.parametrize("status", [200, 503])
def test_the_health_check_fails_where_the_service_does(status):
    class Answer(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            self.end_headers()

        def log_message(self, *arguments): ...

    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/health"
        done = health_check({"HEALTH_URL": url})
    assert (done.returncode == 0) == (status == 200)
    assert status == 200 or url in done.stderr


def test_a_container_without_address_is_healthy():
    assert health_check({}).returncode == 0


def health_check(environment):
    command = [sys.executable, "-I", str(INFRA / "healthcheck.py")]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


# -- compose


def test_compose_fits_its_schema():
    validate(COMPOSE, get_builtin_schema("vendor.compose-spec"))


def test_every_variable_of_compose_is_in_the_example_and_none_is_left_over():
    used = set(re.findall(r"(?<!\$)\$\{(\w+)", (INFRA / "compose.yaml").read_text()))
    example = (INFRA / "env.example").read_text()
    assert used == set(re.findall(r"^(\w+)=", example, flags=re.M))
    secrets = re.findall(r"^\w*(?:PASSWORD|SECRET|KEY)\w*=.*$", example, flags=re.M)
    assert len(secrets) == 4 and all(line.endswith("=") for line in secrets)
    assert ".env" in (INFRA / ".gitignore").read_text().split()


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_refers_to_what_is_there(name):
    service = SERVICES[name]
    for mount in service.get("volumes", ()):
        source = mount.split(":")[0]
        assert source.startswith("${") or source in COMPOSE["volumes"] or (INFRA / source).exists(), mount
    depends = service.get("depends_on", {})
    for other, how in depends.items() if isinstance(depends, dict) else ():
        checked = "healthcheck" in SERVICES[other] or "HEALTH_URL" in SERVICES[other]["environment"]
        assert checked or how["condition"] == "service_completed_successfully", (name, other)
    # one without a profile must not wait for one that may not be there
    reachable = {*service.get("profiles", ()), None}
    assert all(set(SERVICES[other].get("profiles", [None])) <= reachable for other in depends)
    ends = service["restart"] == "on-failure"
    assert ends or "healthcheck" in service or "HEALTH_URL" in service["environment"]


def test_volumes_are_used_and_ports_are_on_this_machine_alone():
    mounts = {mount.split(":")[0] for service in SERVICES.values() for mount in service.get("volumes", ())}
    assert set(COMPOSE["volumes"]) <= mounts
    ports = [port for service in SERVICES.values() for port in service.get("ports", ())]
    assert len(ports) >= 5 and all(port.startswith("${BIND:-127.0.0.1}:") for port in ports)


@pytest.mark.parametrize("name", [name for name, service in SERVICES.items() if "entrypoint" in service])
def test_a_service_of_a_profile_does_not_start_without_its_secrets(name):
    *words, program = [word.replace("$$", "$") for word in SERVICES[name]["entrypoint"]]
    assert program.startswith("/")
    from_example = re.compile(r"\$\{((?:AWS|GRAFANA)_\w+):-\}")
    secrets = {
        variable: from_example.fullmatch(str(value))[1]
        for variable, value in SERVICES[name]["environment"].items()
        if from_example.fullmatch(str(value))
    }
    assert secrets
    given = {**dict.fromkeys(secrets, "secret"), "PATH": os.environ["PATH"]}

    def start(environment):
        return subprocess.run([*words, "echo", "started"], env=environment, capture_output=True, text=True)

    assert start(given).stdout == "started\n"
    for variable, asked in secrets.items():
        done = start({**given, variable: ""})
        assert done.returncode and not done.stdout and f"set {asked} in infra/.env" in done.stderr


# -- Kubernetes


@cache
def documents(path):
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl, which renders the overlays, is not installed")
    done = subprocess.run(["kubectl", "kustomize", str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.name)
def test_an_overlay_renders_to_objects_of_the_api_that_fit_together(overlay):
    rendered = documents(overlay)
    for document in rendered:
        kubernetes_models.check(document)
    assert all(
        document["kind"] == "Namespace" or document["metadata"]["namespace"] == "negfacediff"
        for document in rendered
    )
    there = {(document["kind"], document["metadata"]["name"]) for document in rendered}
    for pod in pods(rendered):
        named = {volume["name"]: volume for volume in pod.get("volumes", ())}
        for container in [*pod.get("initContainers", ()), *pod["containers"]]:
            own = {"database"} if container["name"] == "postgres" else set()  # of a claim template
            mounted = {mount["name"] for mount in container.get("volumeMounts") or ()}
            assert mounted <= {*named, *own}
            ports = {port["name"] for port in container.get("ports", ())}
            probes = [container[key] for key in container if key.endswith("Probe")]
            assert {probe["httpGet"]["port"] for probe in probes if "httpGet" in probe} <= ports
        for volume in named.values():
            claim, config = volume.get("persistentVolumeClaim"), volume.get("configMap")
            assert not claim or ("PersistentVolumeClaim", claim["claimName"]) in there
            assert not config or ("ConfigMap", config["name"]) in there
    labels = [
        document["spec"]["template"]["metadata"]["labels"]
        for document in rendered
        if document["kind"] in ("Deployment", "StatefulSet")
    ]
    selectors = [document["spec"]["selector"] for document in rendered if document["kind"] == "Service"]
    assert selectors and all(selector in labels for selector in selectors)


def test_overlays_are_what_their_names_say():
    for overlay in OVERLAYS:
        text = yaml.safe_dump_all(documents(overlay))
        assert ("nvidia.com/gpu: '1'" in re.sub(r"kubernetes.yaml: .*?kind:", "", text, flags=re.S)) == (
            "gpu" in overlay.name
        )
        assert ("claimName: store" in text) == ("pvc" in overlay.name)
        assert ("s3://" in text) == ("s3" in overlay.name)


def test_the_check_of_manifests_finds_what_is_wrong():
    pod = {"containers": [{"name": "one", "image": "two"}]}
    good = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "one"}, "spec": pod}
    kubernetes_models.check(good)
    for wrong in ({"contaners": []}, {"containers": [{"image": "two"}]}, {**pod, "hostNetwork": "yes"}):
        with pytest.raises((AssertionError, ValueError)):
            kubernetes_models.check({**good, "spec": wrong})


def test_the_pod_that_weights_are_copied_to_can_write_where_the_others_read_them():
    (pod,) = yaml.safe_load_all((INFRA / "kubernetes/fill.yaml").read_text())
    kubernetes_models.check(pod)
    claims = {one["name"]: one["persistentVolumeClaim"]["claimName"] for one in pod["spec"]["volumes"]}
    (mount,) = pod["spec"]["containers"][0]["volumeMounts"]
    readers = [container for one in pods(documents(GPU)) for container in one["containers"]]
    mounts = [one for reader in readers for one in reader.get("volumeMounts") or ()]
    mounts = [one for one in mounts if one["mountPath"] == mount["mountPath"]]
    assert len(mounts) == 3  # of flows, of CPU and of GPU workers
    assert all(one["readOnly"] and one["name"] == claims[mount["name"]] for one in mounts)
    image = (INFRA / "weights.Dockerfile").read_text()
    assert f"COPY . {mount['mountPath']}\n" in image
    page = (ROOT / "docs/operations.md").read_text()
    assert f"{pod['metadata']['namespace']}/{pod['metadata']['name']}:{mount['mountPath']}\n" in page


GPU = INFRA / "kubernetes/overlays/gpu-pvc"


def pods(documents):
    """Every pod's specification in some objects."""
    for document in documents:
        if "template" in document.get("spec", {}):
            yield document["spec"]["template"]["spec"]
        for part in ("scheduler", "worker"):
            if part in document.get("spec", {}):
                yield document["spec"][part]["spec"]


def test_the_settings_of_the_executor_kubernetes_make_pods_of_the_api():
    from dask_kubernetes.operator.kubecluster.kubecluster import make_cluster_spec

    settings = yaml.safe_load((INFRA / "kubernetes/base/kubernetes.yaml").read_text())["kubernetes"]
    options = {name: settings[key] for name, key in OPTIONS.items()}
    spec = make_cluster_spec("builds", n_workers=2, idle_timeout=600, **options)
    kubernetes_models.check(spec)
    (worker,) = spec["spec"]["worker"]["spec"]["containers"]
    assert command_lines.check(worker["args"])


OPTIONS = {"image": "image", "env": "env", "resources": "resources", "worker_command": "worker-command"}


# -- Prefect's servers


def image_environment():
    """What the image sets for every container."""
    (block,) = re.findall(r"^ENV (PATH=(?:.*\\\n)*.*)$", (INFRA / "Dockerfile").read_text(), flags=re.M)
    return dict(re.findall(r"(\w+)=(\S+)", block))


def servers():
    """Every Prefect server of infra/: its environment, and folders on volumes that outlast it."""
    for name, service in SERVICES.items():
        if service.get("command", [])[:3] == SERVER:
            lasting = [mount.split(":") for mount in service["volumes"]]
            mounts = [place for source, place in lasting if source in COMPOSE["volumes"]]
            yield pytest.param(service["environment"], mounts, id=f"compose {name}")
    for path in sorted(INFRA.glob("kubernetes/**/*.yaml")):
        for pod in pods(yaml.safe_load_all(path.read_text())):
            for container in pod["containers"]:
                if container.get("args", [])[:3] == SERVER:
                    claims = {one["name"] for one in pod["volumes"] if "persistentVolumeClaim" in one}
                    mounts = [one["mountPath"] for one in container["volumeMounts"] if one["name"] in claims]
                    environment = {one["name"]: one.get("value") for one in container["env"]}
                    yield pytest.param(environment, mounts, id=path.name)


SERVER = ["prefect", "server", "start"]


@pytest.mark.parametrize(("environment", "mounts"), servers())
def test_a_server_has_the_settings_of_serve_and_its_turns_outlast_it(environment, mounts):
    image = image_environment()
    assert {**image, **environment}.items() >= serve.SERVER.items()
    # where Prefect keeps the leases of its concurrency limits: <PREFECT_HOME>/concurrency_leases
    assert mounts == [environment.get("PREFECT_HOME", image["PREFECT_HOME"])]


def test_a_server_by_hand_keeps_its_turns_too():
    page = (ROOT / "docs/operations.md").read_text()
    (block,) = [block for block in CONSOLE.findall(page) if "prefect server start" in block]
    variable = "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE"
    assert f"export {variable}={serve.SERVER[variable]}\n" in block


# -- SLURM


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_is_sound(script):
    linted("bash", "-n", script)
    linted(TOOLS / "shellcheck", "--external-sources", "--source-path", ROOT, script)
    for option in re.findall(r"^#SBATCH --([\w-]+)", script.read_text(), flags=re.M):
        assert option in SBATCH, option


SBATCH = {"array", "cpus-per-task", "gres", "job-name", "mem", "ntasks", "output", "requeue", "time"}


def test_builds_find_the_scheduler_that_left_its_address(tmp_path):
    file = tmp_path / "scheduler.json"
    environment = {**os.environ, "SCHEDULER_FILE": str(file)}
    command = [str(INFRA / "slurm/address.sh")]
    missing = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert missing.returncode == 1 and "scheduler.sbatch" in missing.stderr
    file.write_text(json.dumps({"address": "tcp://10.0.0.1:8786"}))
    assert subprocess.check_output(command, env=environment, text=True) == "tcp://10.0.0.1:8786\n"


def test_the_jobs_of_the_executor_slurm_ask_for_a_gpu_and_declare_it(tmp_path):
    import dask
    from dask_jobqueue.slurm import SLURMJob

    settings = yaml.safe_load((INFRA / "slurm/jobqueue.yaml").read_text())["jobqueue"]["slurm"]
    settings["log-directory"] = str(tmp_path / settings["log-directory"])  # which is made
    with dask.config.set({"jobqueue.slurm": {**dask.config.get("jobqueue.slurm"), **settings}}):
        options = {"processes": settings["processes"], "worker_extra_args": settings["worker-extra-args"]}
        text = SLURMJob("tcp://127.0.0.1:8786", "check", **options).job_script()
    for line in ("#SBATCH --gres=gpu:1", "#SBATCH -t 1-00:00:00", "export OMP_NUM_THREADS=1"):
        assert line in text.splitlines()
    assert "--resources GPU=2" in text and "--nthreads 8" in text
    linted("bash", "-c", f"bash -n <<'SCRIPT'\n{text}\nSCRIPT")


# -- everything that is run


def commands():
    """Every command line of infra/, with where it stands."""
    for name, service in SERVICES.items():
        if "command" in service and service["image"].startswith("negfacediff"):
            yield f"compose {name}", service["command"]
    for path in sorted(INFRA.glob("kubernetes/**/*.yaml")):
        for document in yaml.safe_load_all(path.read_text()):
            for pod in pods([document]):
                for container in [*pod.get("initContainers", ()), *pod["containers"]]:
                    if "args" in container:
                        yield f"{path.name} {container['name']}", container["args"]
    for path in SCRIPTS:
        for words in command_lines.lines_of(path.read_text()):
            if words[0] == "exec":
                yield path.name, words[1:]


@pytest.mark.parametrize(
    ("place", "words"), commands(), ids=lambda value: value if isinstance(value, str) else ""
)
def test_a_command_is_one_that_its_program_takes(place, words):
    words = [substituted(word) for word in words]
    if words[:2] == ["python", "-c"]:
        compile(words[2], place, "exec")
        return
    lines = command_lines.lines_of(words[2]) if words[:2] == ["sh", "-ec"] else [words]
    assert all(command_lines.check(line) for line in lines)


def substituted(word):
    """Put in what compose, the shell or Kubernetes would: defaults, and a number for what they alone know."""
    word = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", word)
    return re.sub(r"\$\(?\{?\w+\}?\)?", "7", word)


def documented():
    """Every command of docs/operations.md: in blocks, and within the text."""
    page = (ROOT / "docs/operations.md").read_text()
    for block in CONSOLE.findall(page):
        yield from command_lines.lines_of(block)
    for line in re.findall(r"`((?:negfacediff|prefect) [^`]+)`", page):
        yield line.replace("ID", "0" * 32).split()


@pytest.mark.parametrize("words", documented(), ids=" ".join)
def test_a_documented_command_is_one_that_its_program_takes(words):
    while re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    named = [word for word in words if word.startswith(("infra/", "deployments/"))]
    assert all((ROOT / word).exists() for word in named if word != "infra/.env")
    if words[:2] == ["./run", "test"]:
        assert all((ROOT / word).exists() for word in words if word.startswith("tests/"))
    elif words[:2] == ["docker", "compose"]:
        asked = {words[place + 1] for place, word in enumerate(words) if word == "--profile"}
        assert asked <= {profile for service in SERVICES.values() for profile in service.get("profiles", ())}
        assert "exec" not in words or words[words.index("exec") + 1] in SERVICES
    elif not command_lines.check(words):
        assert words[0] in {"cp", "docker", "export", "kubectl", "mkdir", "sbatch"}, words


def test_the_table_of_sizes_is_what_its_commands_plan():
    plans = [words for words in documented() if words[:2] == ["negfacediff", "plan"] and "--workers" in words]
    rows = re.findall(r"^\| [\d.]+M \|(.+)\|$", (ROOT / "docs/operations.md").read_text(), flags=re.M)
    for words, row in zip(plans, rows, strict=True):
        options = dict(zip(words[3::2], words[4::2], strict=True))
        build = load_build(words[2], [word for word in words if "=" in word])
        execution = ExecutionConfig(executor=options["--executor"], workers=options["--workers"])
        plan = plan_of(build, "store", execution, load_calibration(options["--device"]))
        people, block, units, size, runs, evaluations, hours, *_ = (cell.strip() for cell in row.split("|"))
        assert people == f"{build.identities:,} x {build.images}"
        assert block == f"{build.block_identities} x {build.block_images}"
        assert (units, runs) == (f"{plan.stages['samples'].units:,}", f"{plan.task_runs}")
        assert size.split()[1] == size_text(sum(stage.bytes for stage in plan.stages.values())).split()[1]
        assert float(evaluations.split()[0]) == pytest.approx(plan.evaluations / 1e9, rel=0.01)
        assert plan.time is not None
        assert float(hours) == pytest.approx(plan.time.device.seconds / 3600, rel=0.01)


def test_a_wrong_command_is_noticed():
    for wrong in (
        ["dask", "worker", "--nthread", "1"],
        ["prefect", "worker", "start", "--pol", "x"],
        ["negfacediff", "build", "demo", "--stroe", "x"],
    ):
        with pytest.raises(Exception, match=r"(?i)unexpected extra argument|no such option|unknown option"):
            command_lines.check(wrong)


def test_every_setting_of_prefect_exists():
    from prefect.settings import Settings
    from prefect.settings.legacy import _get_settings_fields

    known = _get_settings_fields(Settings)
    texts = [path.read_text() for path in (*TEXTS, ROOT / "docs/operations.md")]
    named = {name for text in texts for name in re.findall(r"\bPREFECT_[A-Z_]+\b", text)}
    assert {"PREFECT_SERVER_DATABASE_CONNECTION_URL", "PREFECT_UI_API_URL"} <= named <= set(known)


# -- Grafana and Prometheus


@pytest.fixture(scope="module")
def exported():
    """The names of all series that Dask's scheduler and workers export, those of the builds among them."""
    from distributed import LocalCluster
    from distributed.http.scheduler.prometheus.core import SchedulerMetricCollector
    from distributed.http.worker.prometheus.core import WorkerMetricCollector

    from tasks import metrics

    with LocalCluster(n_workers=1, processes=False, protocol="tcp://", dashboard_address=None) as cluster:
        (worker,) = cluster.workers.values()
        families = [
            *SchedulerMetricCollector(cluster.scheduler).collect(),
            *WorkerMetricCollector(worker).collect(),
            *(
                family
                for made in (metrics.UNITS, metrics.IMAGES, metrics.SECONDS)
                for family in made.collect()
            ),
        ]
    suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_count", "_sum"]}
    return {family.name + end for family in families for end in suffixes.get(family.type, [""])} | {
        metrics.GPU_MEMORY,
        metrics.GPU_UTILIZATION,
    }


def queries():
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", ()):
            yield pytest.param(target["expr"], id=f"{panel['title']} {target['refId']}")


@pytest.mark.parametrize("query", queries())
def test_a_query_asks_for_what_is_exported(query, exported):
    query = query.replace("$__rate_interval", "1m").replace("$__range", "1h").replace("$stage", ".+")
    promql_parser.parse(query)
    named = set(re.findall(r"\b(?:negfacediff|dask)_\w+", query))
    assert named and named <= exported, named - exported


def test_the_dashboard_is_whole_and_its_panels_do_not_overlap():
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    places = [tuple(panel["gridPos"][key] for key in "xywh") for panel in panels]
    assert all(x + w <= 24 for x, y, w, h in places)
    for (x, y, w, h), (other_x, other_y, other_w, other_h) in itertools.combinations(places, 2):
        apart = x + w <= other_x or other_x + other_w <= x or y + h <= other_y or other_y + other_h <= y
        assert apart, ((x, y), (other_x, other_y))
    assert all(panel["type"] == "row" or panel["description"] for panel in panels)


def test_grafana_finds_the_dashboard_and_its_source():
    provisioning = INFRA / "grafana/provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources/prometheus.yaml").read_text())["datasources"]
    used = {panel["datasource"]["uid"] for panel in DASHBOARD["panels"] if "datasource" in panel}
    assert used == {source["uid"]}
    assert re.fullmatch(r"http://(\w+):9090", source["url"])[1] in SERVICES
    (provider,) = yaml.safe_load((provisioning / "dashboards/negfacediff.yaml").read_text())["providers"]
    mounts = dict(mount.split(":")[:2] for mount in SERVICES["grafana"]["volumes"])
    assert mounts["./grafana/dashboards"] == provider["options"]["path"]
    assert mounts["./grafana/provisioning"] == "/etc/grafana/provisioning"


def test_prometheus_reads_the_ports_that_are_served():
    config = yaml.safe_load((INFRA / "grafana/prometheus.yml").read_text())
    scheduler, workers = config["scrape_configs"]
    targets = [target.split(":") for entry in scheduler["static_configs"] for target in entry["targets"]]
    targets += [[name, str(entry["port"])] for entry in workers["dns_sd_configs"] for name in entry["names"]]
    assert len(targets) == 3
    for name, port in targets:
        assert f":{port}" in SERVICES[name]["command"], name
