"""`dgpo doctor`: is everything there that a recipe needs, and if not, how to mend it.

Promises
- Checks without spending: nothing is trained, no model is loaded, no Ray is started.
- Every finding that is not fine says what to do about it.
"""

from __future__ import annotations

import difflib
import importlib.util
import json
import os
from collections.abc import Callable

import psutil
from rich.markup import escape
from rich.table import Table

from services.config import Config
from services.config.placement import ACCELERATOR
from services.config_file import ConfigError, find
from services.demands import (
    Node,
    demands,
    replicas_to_come,
    reserved,
    shortfalls,
)
from services.doctor.finding import Finding
from services.doctor.model import file_findings, rollout_findings, shift_findings
from services.doctor.ray_cluster import ray_findings
from services.doctor.room import room_findings
from services.doctor.servers import queue_findings, reward_findings, scores_nothing
from services.prompts import prompt_source
from services.ray_runtime import cluster_address, learner_backend, own_cpus
from services.trackers import missing

__all__ = ["Finding", "examine", "table"]

PROCESS_BYTES = 600 * 1024**2
"""What a process with torch and the libraries around it holds before its model."""


_PROMPTS_REMEDY = (
    "make or mend the file, or set prompts.path and eval.path (`dgpo prompts` makes GenEval's); a dataset "
    "comes from the hub, or from the cache in HF_HOME: see prompts.dataset and prompts.revision"
)


def examine(config: Config) -> list[Finding]:
    """All findings, in the order in which a run would stumble over them."""
    checks: list[Callable[[Config], list[Finding]]] = [
        _directory,
        _model,
        _devices,
        _ranks,
        _optimizer,
        _transport,
        _trackers,
        _prompts,
        _timesteps,
        _local_model,
        shift_findings,
        queue_findings,
        reward_findings,
        _memory,
        ray_findings,
        room_findings,
    ]
    return [finding for check in checks for finding in check(config)]


def table(findings: list[Finding]) -> Table:
    """Findings for people."""
    sheet = Table(title="dgpo doctor", title_justify="left", show_lines=False)
    sheet.add_column("")
    sheet.add_column("what")
    sheet.add_column("found", overflow="fold")
    sheet.add_column("remedy", overflow="fold")
    for finding in findings:
        fine = "[yellow]warn[/]" if finding.warning else "[green]ok[/]"
        mark = fine if finding.ok else "[red]no[/]"
        # Brackets are none of its own: `pip install 'dgpo-cluster[8bit]'`.
        sheet.add_row(mark, *map(escape, (finding.what, finding.found, finding.remedy)))
    return sheet


def _directory(config: Config) -> list[Finding]:
    place = config.run.directory.resolve()
    # Path.exists() raises of what lies in a folder that may not be entered.
    existing = next(p for p in (place, *place.parents) if os.path.exists(p))  # noqa: PTH110
    writable = existing.is_dir() and os.access(existing, os.W_OK)
    free = psutil.disk_usage(str(existing)).free
    ok = writable and free > 1024**3
    return [
        Finding(
            what="run directory",
            ok=ok,
            found=f"{place}: {'writable' if writable else 'not writable'}, {free / 1024**3:.1f} GiB free",
            remedy="" if ok else "set run.directory to a writable place with at least 1 GiB free",
        )
    ]


def _model(config: Config) -> list[Finding]:
    place = find(config.model.path)
    if not place.is_dir():
        name = config.model.path
        # `folder/typo` has the form of a hub id: where the folder is there, a directory was meant.
        beside = sorted(str(found.parent) for found in find(name).parent.glob("*/model_index.json"))
        parent = name.rpartition("/")[0]
        hub = name.count("/") == 1 and not name.startswith((".", "/")) and not find(parent).is_dir()
        near = difflib.get_close_matches(str(find(name)), beside, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        return [
            Finding(
                what="model",
                ok=hub,
                found=f"{name}: no such directory" + (", taken as a hub id" if hub else ""),
                remedy=""
                if hub
                else f"set model.path to a directory in diffusers format, or to a hub id{hint}",
            )
        ]
    try:
        index = json.loads((place / "model_index.json").read_text())
    except (OSError, ValueError) as error:
        remedy = "model.path must hold a pipeline saved by diffusers (model_index.json and its components)"
        return [Finding(what="model", ok=False, found=f"{place}: {error}", remedy=remedy)]
    missing = [
        name
        for name, kind in index.items()
        if isinstance(kind, list) and kind[0] is not None and not (place / name).is_dir()
    ]
    found = f"{place}: {index.get('_class_name')}" + (f", without {', '.join(missing)}" if missing else "")
    remedy = "save the pipeline again with save_pretrained" if missing else ""
    return [Finding(what="model", ok=not missing, found=found, remedy=remedy)]


def _devices(config: Config) -> list[Finding]:
    """Of this machine: a cluster's may be others."""
    if cluster_address(config) is not None:
        return []
    import torch

    there = torch.cuda.device_count()
    # Of which type they are is not looked up.
    types = {name: 1.0 for demand in demands(config) for name in demand.each if name.startswith(ACCELERATOR)}
    here = Node({"CPU": own_cpus(config), "GPU": there} | (types if there else {}))
    short = shortfalls(demands(config), [here], "this machine")
    cuda = config.model.device.startswith("cuda")
    ok = not short and not (cuda and there == 0)
    sum_text = "".join(f"; {one.text}" for one in short)
    found = (
        f"{there} GPUs here, {reserved(config, 'num_gpus'):g} reserved, model.device "
        f"{config.model.device}{sum_text}"
    )
    remedy = (
        ""
        if ok
        else "lower num_gpus of rollout, learner, eval and rewards, or learner.ranks; leave out resources "
        "and accelerator_type, or join a cluster; set model.device to cpu or auto"
    )
    return [Finding(what="devices", ok=ok, found=found, remedy=remedy)]


def _ranks(config: Config) -> list[Finding]:
    """How several ranks share an update, and what they talk over."""
    learner = config.learner
    if learner.ranks == 1:
        return []
    backend = learner_backend(config)
    most = -(-learner.groups_per_step // learner.ranks)
    held = "the whole model" if learner.sharding == "none" else f"1/{learner.ranks} of the model"
    found = (
        f"{learner.ranks} ranks share {learner.groups_per_step} groups an update, {most} at most each; each "
        f"reserves {learner.num_cpus:g} CPU and {learner.num_gpus:g} GPU, and holds {held}; gradients are "
        f"added by {'NCCL' if backend != 'gloo' else 'gloo'}"
    )
    import torch

    ok = backend == "gloo" or torch.distributed.is_nccl_available() or cluster_address(config) is not None
    remedy = "" if ok else "install a torch with CUDA, or set learner.num_gpus to 0"
    return [Finding(what="ranks", ok=ok, found=found, remedy=remedy)]


def _optimizer(config: Config) -> list[Finding]:
    """Of this machine: a cluster's may have other packages."""
    if config.learner.optimizer == "adamw" or cluster_address(config) is not None:
        return []
    ok = importlib.util.find_spec("bitsandbytes") is not None
    found = f"{config.learner.optimizer}: bitsandbytes is {'installed' if ok else 'not installed'}"
    remedy = "" if ok else "pip install 'dgpo-cluster[8bit]', or set learner.optimizer to adamw"
    return [Finding(what="optimizer", ok=ok, found=found, remedy=remedy)]


def _transport(config: Config) -> list[Finding]:
    """Of this machine, as the optimizer."""
    if config.learner.publish_through != "nccl" or cluster_address(config) is not None:
        return []
    ok = importlib.util.find_spec("cupy") is not None
    found = f"{config.learner.publish_through}: CuPy is {'installed' if ok else 'not installed'}"
    remedy = (
        "" if ok else "pip install 'dgpo-cluster[nccl]', or set learner.publish_through to process_groups"
    )
    return [Finding(what="weights", ok=ok, found=found, remedy=remedy)]


def _trackers(config: Config) -> list[Finding]:
    """Of this machine: on a cluster it is the driver's node that needs the packages."""
    found = []
    for name in config.telemetry.trackers:
        lacks, _, get_it = (missing(name) or "").partition(": ")
        remedy = f"{get_it}, or leave it out of telemetry.tracker" if lacks else ""
        found.append(Finding(what=f"tracker {name}", ok=not lacks, found=lacks or "installed", remedy=remedy))
    return found


def _prompts(config: Config) -> list[Finding]:
    if config.offline:
        return [_recording(config)]
    try:
        first = prompt_source(config).training(config.run.seed, 0).text
    except ConfigError as error:
        return [Finding(what="prompts", ok=False, found=str(error), remedy=_PROMPTS_REMEDY)]
    return [Finding(what="prompts", ok=True, found=f"the first one: {first}")]


def _timesteps(config: Config) -> list[Finding]:
    from learner.timesteps import configured_window

    try:
        window = configured_window(config)
    except ValueError as error:
        return [Finding(what="timesteps", ok=False, found=str(error), remedy="see objective.timesteps")]
    found = f"training on solver steps {window.start + 1} to {window.stop} of {config.rollout.steps}"
    return [Finding(what="timesteps", ok=True, found=found)]


def _local_model(config: Config) -> list[Finding]:
    """Of one that is not here, or not there as a whole, nothing can be said."""
    if not find(config.model.path).is_dir() or not all(finding.ok for finding in _model(config)):
        return []
    return [*file_findings(config), *rollout_findings(config)]


def _recording(config: Config) -> Finding:
    from services.offline import differences, open_recording

    try:
        recording = open_recording(config)
    except ConfigError as error:
        remedy = (
            "make one (dgpo record, or telemetry.record in a run), mend prompts.path or what contradicts it"
        )
        return Finding(what="recording", ok=False, found=str(error), remedy=remedy)
    facts, steps = recording.facts, config.learner.max_steps * config.learner.groups_per_step
    found = (
        f"{len(recording)} groups of {facts.group_size} by {facts.run}, solver {facts.solver}, rewards "
        f"{', '.join(facts.rewards)}; passed through {steps / len(recording):.1f} times"
    )
    return Finding(what="recording", ok=True, found="; ".join([found, *differences(config, facts)]))


def _memory(config: Config) -> list[Finding]:
    workers = 1 if config.offline else config.rollout.workers
    replicas = sum(reward.replicas for reward in config.rewards if reward.app is not None)
    replicas = 0 if scores_nothing(config) else replicas
    processes = workers + config.learner.ranks + 2 + replicas
    place = find(config.model.path)
    model = sum(f.stat().st_size for f in place.rglob("*.safetensors")) if place.is_dir() else 0
    holders = (0 if config.offline else workers) + config.learner.ranks + (0 if scores_nothing(config) else 1)
    needed = processes * PROCESS_BYTES + holders * model * 2 + config.cluster.object_store_mb * 1024**2
    grown = needed + (0 if scores_nothing(config) else replicas_to_come(config)) * PROCESS_BYTES
    free = psutil.virtual_memory().available
    ok, warning = free > needed, needed < free <= grown
    found = f"{free / 1024**3:.1f} GiB free, about {needed / 1024**3:.1f} GiB needed on one machine"
    found += "" if place.is_dir() else ", without the model, whose size is not known here"
    remedy = "" if ok else "lower rollout.workers, or close other programs"
    return [
        Finding(
            what="memory",
            ok=ok,
            warning=warning,
            found=found + (f", {grown / 1024**3:.1f} GiB at max_replicas" if grown > needed else ""),
            remedy="lower max_replicas of rewards, or close other programs" if warning else remedy,
        )
    ]
