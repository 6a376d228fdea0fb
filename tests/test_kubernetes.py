"""What launch/kubernetes.sh makes of its variables is what Kubernetes 1.37 knows, and says what we mean."""

import subprocess

import kubernetes_validate
import pytest
import yaml
from launching import ROOT

VERSION = "1.37"


def render(*words, **env):
    """Call the script as ``make train CLUSTER=kubernetes`` does; it prints instead of applying."""
    variables = {"IMAGE": "registry.example/scaletrain:1", "DRY_RUN": "1", "PATH": "/usr/local/bin:/usr/bin:/bin"}
    command = [str(ROOT / "launch/kubernetes.sh"), *words]
    return subprocess.run(command, env=variables | env, capture_output=True, text=True, check=False, timeout=30)


def resources(*words, **env):
    rendered = render(*words, **env)
    assert rendered.returncode == 0, rendered.stderr
    return list(yaml.safe_load_all(rendered.stdout))


def validate(resource):
    kubernetes_validate.validate(resource, VERSION, strict=True)


def container(job):
    (found,) = job["spec"]["template"]["spec"]["containers"]
    return found


@pytest.mark.parametrize("nodes", [1, 2, 64])
@pytest.mark.parametrize("gpus", [0, 1, 8])
def test_the_rendered_job_is_valid_for_any_size(nodes, gpus):
    service, job = resources("lm", "--max-steps", "9", NODES=str(nodes), GPUS=str(gpus), CONFIG="fsdp2")
    validate(service)
    validate(job)
    spec = job["spec"]
    assert (spec["completions"], spec["parallelism"], spec["completionMode"]) == (nodes, nodes, "Indexed")
    assert container(job)["resources"]["limits"] == {"nvidia.com/gpu": gpus}
    assert container(job)["args"] == ["lm", "--max-steps", "9"]
    env = {entry["name"]: entry["value"] for entry in container(job)["env"]}
    assert (env["NODES"], env["GPUS"], env["CONFIG"]) == (str(nodes), str(gpus), "fsdp2")


def test_the_pods_meet_at_pod_0_and_share_the_run_folder():
    service, job = resources("cnn_sam", NODES="2")
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    name = job["metadata"]["name"]
    assert name == "cnn-sam"
    env = {entry["name"]: entry["value"] for entry in container(job)["env"]}
    assert env["HEAD"] == f"{name}-0.{pod['subdomain']}:{service['spec']['ports'][0]['port']}"
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"]
    assert service["spec"]["selector"] == {
        "batch.kubernetes.io/job-name": name
    }  # a label that Kubernetes gives its pods
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container(job)["volumeMounts"]}
    assert mounts["/runs"]["persistentVolumeClaim"] == {"claimName": "scaletrain-runs"}
    assert mounts["/dev/shm"]["emptyDir"]["medium"] == "Memory"
    assert env["SCALETRAIN_OUT"].startswith("/runs/")
    assert spec["podReplacementPolicy"] == "Failed"  # the only one that podFailurePolicy allows


def test_preemption_costs_no_retry_and_bad_input_ends_the_job():
    _, job = resources("lm")
    rules = job["spec"]["podFailurePolicy"]["rules"]
    assert rules[0] == {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    by_code = {code: rule["action"] for rule in rules[1:] for code in rule["onExitCodes"]["values"]}
    assert by_code == {75: "Ignore", 2: "FailJob", 3: "FailJob"}
    pod = job["spec"]["template"]["spec"]
    assert pod["restartPolicy"] == "Never"
    assert {rule["onExitCodes"]["containerName"] for rule in rules[1:]} == {container(job)["name"]}


@pytest.mark.parametrize("grace", [30, 600])
def test_a_pod_lives_longer_than_its_processes_may_take_to_save(grace):
    _, job = resources("lm", GRACE=str(grace))
    env = {entry["name"]: entry["value"] for entry in container(job)["env"]}
    assert int(env["GRACE"]) == grace < job["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]


def test_options_arrive_as_they_were_given():
    words = ["--note", 'a "b" \\ $(HOME) & ${NAME}: {x} #', "--lr=1e-3", "it's"]
    _, job = resources("mlp", *words)
    assert container(job)["args"] == ["mlp", *(word.replace("$(", "$$(") for word in words)]


MISTAKES = {
    "a misspelt field": lambda job: job["spec"].update(paralelism=2),
    "a number as text": lambda job: job["spec"].update(completions="two"),
    "a field in the wrong place": lambda job: job["spec"].update(terminationGracePeriodSeconds=60),
    "a missing field": lambda job: job["spec"]["template"]["spec"].pop("containers"),
    "a number for a variable": lambda job: container(job)["env"][0].update(value=2),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_validation_sees_a_mistake(mistake):
    _, job = resources("lm")
    validate(job)
    MISTAKES[mistake](job)
    with pytest.raises(kubernetes_validate.ValidationError):
        validate(job)


@pytest.mark.parametrize(
    ("words", "env", "said"),
    [
        ((), {}, "usage: launch/kubernetes.sh RECIPE [options]; recipes: binary cnn"),
        (("ml",), {}, "error: no recipe 'ml'; there are: binary cnn"),
        (("lm",), {"IMAGE": ""}, "error: IMAGE is not set: give the name of an image built from launch/Dockerfile"),
        (("lm",), {"IMAGE": "x\nkind: Pod"}, "error: IMAGE=x"),
        (("lm",), {"NODES": "1:4"}, "error: NODES=1:4: expected a number of machines"),
        (("lm",), {"GPUS": "all"}, "error: GPUS=all: expected a whole number"),
        (("lm",), {"NAME": "My_run"}, "error: NAME=My_run: expected small letters"),
        (("lm",), {"MEMORY": "lots"}, "error: MEMORY=lots: expected a quantity"),
        (("lm", "--out", "here"), {}, "error: --out is the cluster's"),
    ],
)
def test_bad_input_is_one_line_and_renders_nothing(words, env, said):
    rendered = render(*words, **env)
    assert rendered.returncode != 0
    assert said in rendered.stderr
    assert rendered.stdout == ""


def test_it_hands_to_kubectl_what_it_prints(tmp_path):
    """A kubectl that only notes what it is given stands for a cluster."""
    kubectl = tmp_path / "kubectl"
    kubectl.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/arguments\ncat > {tmp_path}/given\n')
    kubectl.chmod(0o755)
    applied = render("lm", NODES="2", DRY_RUN="", PATH=f"{tmp_path}:/usr/local/bin:/usr/bin:/bin")
    assert applied.returncode == 0, applied.stderr
    assert (tmp_path / "arguments").read_text() == "apply -f -\n"
    assert (tmp_path / "given").read_text() == render("lm", NODES="2").stdout


def test_the_image_holds_what_a_pod_runs():
    lines = (ROOT / "launch/Dockerfile").read_text().splitlines()
    copied = [word for line in lines if line.startswith("COPY ") for word in line.split()[1:-1]]
    assert all((ROOT / name).exists() for name in copied)
    assert {"launch", "recipes", "scaletrain", "accelerate_configs"} <= set(copied)
    _, job = resources("lm")
    assert container(job)["command"] == ["launch/torchrun.sh"]
    assert (ROOT / "launch/torchrun.sh").stat().st_mode & 0o111
