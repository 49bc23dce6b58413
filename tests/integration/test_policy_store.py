"""Weights by version through a real object store: proven at arrival, refused when wrong, not lost."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import safetensors.torch
import torch

from services.codec import encode_weights, weights_digest
from services.messages import PolicyVersion, WeightsAnnouncement
from services.policy_store import (
    PolicyStore,
    WeightsGone,
    WeightsMismatch,
    fetch,
    install,
    publish,
)
from services.safetensors_layout import Bytes
from services.transports.base import DEADLINE_S
from services.transports.object_store import ObjectStoreTransport

pytestmark = pytest.mark.integration


def version(step: int) -> PolicyVersion:
    return PolicyVersion(epoch=0, step=step)


def tensors(seed: float) -> dict[str, torch.Tensor]:
    return {"a.weight": torch.full((8, 4), float(seed)), "b.weight": torch.arange(6).half() * seed}


@pytest.fixture(scope="module")
def actor(ray_local: None) -> Iterator[Any]:
    handle = ray.remote(PolicyStore).options(num_cpus=0).remote(kept_versions=2)
    yield handle
    ray.kill(handle)


@pytest.fixture
def store(actor: Any) -> ObjectStoreTransport:
    return ObjectStoreTransport(actor)


class Box:
    """A transport that hands over what it is told to."""

    def __init__(self, payload: Bytes | None) -> None:
        self.payload = payload

    def send(self, announcement: WeightsAnnouncement, payload: Bytes) -> None:
        self.payload = payload.copy()

    def reclaim(self, kind: str) -> Bytes | None:
        return None

    def receive(self, announcement: WeightsAnnouncement) -> Bytes | None:
        return self.payload

    def close(self) -> None:
        self.payload = None


def learner() -> Any:
    """A publisher in a process of its own; defined in here, Ray ships its code and not a module name."""

    class Publisher:
        def publish(self, store: Any, values: dict[str, torch.Tensor], step: int) -> str:
            return publish(store, values, PolicyVersion(epoch=0, step=step)).model_dump_json()

        def fetched(self, store: Any, announcement: str) -> str:
            return weights_digest(fetch(store, WeightsAnnouncement.model_validate_json(announcement)))

    return ray.remote(Publisher).options(num_cpus=0).remote()


def test_what_is_fetched_is_what_was_published(store: Any) -> None:
    announcement = publish(store, tensors(3.0), version(1))
    found = fetch(store, announcement)
    assert found.keys() == tensors(3.0).keys()
    assert all(found[name].equal(tensor) for name, tensor in tensors(3.0).items())
    assert (announcement.tensors, announcement.digest) == (2, weights_digest(tensors(3.0)))


def test_a_later_publish_does_not_change_what_was_fetched(store: Any) -> None:
    found = fetch(store, publish(store, tensors(1.0), version(1)))
    publish(store, tensors(2.0), version(2))
    assert found["a.weight"].equal(tensors(1.0)["a.weight"])


def test_the_last_versions_of_each_kind_are_kept(actor: Any, store: Any) -> None:
    announced = [publish(store, tensors(step), version(step)) for step in range(3)]
    ema = publish(store, tensors(9), version(0), kind="ema")
    assert ray.get(actor.versions.remote("policy"), timeout=DEADLINE_S) == ["0.1", "0.2"]
    assert fetch(store, announced[2])["a.weight"].equal(tensors(2)["a.weight"])
    assert fetch(store, ema)["a.weight"].equal(tensors(9)["a.weight"])
    with pytest.raises(WeightsGone, match=r"weights policy 0\.0: nobody has them any more"):
        fetch(store, announced[0])


def checkpoint(run_directory: Path, **files: dict[str, torch.Tensor]) -> None:
    folder = run_directory / "checkpoints" / "step-5"
    folder.mkdir(parents=True)
    for name, content in files.items():
        safetensors.torch.save_file(content, folder / f"{name}.safetensors")


def test_weights_of_a_dead_learner_come_from_the_checkpoint(store: Any, tmp_path: Path) -> None:
    publisher = learner()
    told = ray.get(publisher.publish.remote(store, tensors(5), 5), timeout=DEADLINE_S)
    announcement = WeightsAnnouncement.model_validate_json(told)
    assert announcement.digest == weights_digest(fetch(store, announcement))
    assert ray.get(publisher.fetched.remote(store, told), timeout=DEADLINE_S) == announcement.digest
    ray.kill(publisher)
    give_up = time.monotonic() + DEADLINE_S
    while store.receive(announcement) is not None:
        assert time.monotonic() < give_up, "the object outlived its owner"
    for name in ("policy", "reference"):
        run_directory = tmp_path / name
        checkpoint(run_directory, **{"policy": tensors(1), "ema": tensors(2), name: tensors(5)})
        found = fetch(store, announcement, run_directory)
        assert all(found[key].equal(tensor) for key, tensor in tensors(5).items())
    with pytest.raises(WeightsGone):
        fetch(store, announcement)


def test_without_object_and_checkpoint_the_error_says_where_was_looked(tmp_path: Path) -> None:
    announcement = publish(Box(None), tensors(5), version(5))
    checkpoint(tmp_path, policy=tensors(4))
    with pytest.raises(WeightsGone, match=r"policy 0\.5: .*no checkpoint of step 5 in "):
        fetch(Box(None), announcement, tmp_path)
    found = fetch(Box(None), publish(Box(None), tensors(4), version(5)), tmp_path)
    assert found["a.weight"].equal(tensors(4)["a.weight"])


def changed(payload: Bytes) -> Bytes:
    wrong = payload.copy()
    wrong[-1] ^= 1
    return wrong


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda payload: changed(payload), "digest .* arrived"),
        (lambda payload: payload[:-3], "not readable: truncated"),
        (
            lambda payload: encode_weights({"a.weight": tensors(1)["a.weight"]}),
            "2 tensors were published, 1 arrived",
        ),
        (lambda payload: np.zeros(0, dtype=np.uint8), "not readable"),
    ],
)
def test_other_weights_than_the_announced_ones_are_refused(wrong: Any, says: str) -> None:
    box = Box(None)
    announcement = publish(box, tensors(1), version(1))
    assert box.payload is not None
    with pytest.raises(WeightsMismatch, match=f"weights policy 0.1: .*{says}"):
        fetch(Box(wrong(box.payload)), announcement)


def parameters() -> dict[str, torch.Tensor]:
    return {name: torch.nn.Parameter(torch.zeros_like(tensor)) for name, tensor in tensors(1).items()}


def test_an_install_binds_every_published_tensor(store: Any) -> None:
    announcement = publish(store, tensors(4.0), version(1))
    bound = parameters()
    assert install(store, announcement, bound) == 2
    assert weights_digest(bound) == announcement.digest
    other = parameters()
    install(store, announcement, other)
    assert other["a.weight"].data_ptr() == bound["a.weight"].data_ptr(), "a copy where a view would do"


def test_misaligned_weights_are_copied_to_where_kernels_find_them_as_ever() -> None:
    box, bound = Box(None), parameters()
    announcement = publish(box, tensors(4.0), version(1))
    assert box.payload is not None
    roomy = np.zeros(box.payload.size + 64, dtype=np.uint8)
    begin = (8 - roomy.ctypes.data) % 64
    roomy[begin : begin + box.payload.size] = box.payload
    install(Box(roomy[begin : begin + box.payload.size]), announcement, bound)
    assert weights_digest(bound) == announcement.digest
    assert all(parameter.data_ptr() % 64 == 0 for parameter in bound.values())


def test_an_install_into_another_dtype_is_proven_before_it_binds() -> None:
    box = Box(None)
    announcement = publish(box, tensors(4.0), version(1))
    wide = {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in tensors(1).items()}
    assert install(box, announcement, wide) == 2
    assert wide["a.weight"].equal(tensors(4.0)["a.weight"].double())
    assert box.payload is not None
    with pytest.raises(WeightsMismatch, match="digest"):
        install(Box(changed(box.payload)), publish(box, tensors(4.0), version(1)), wide)
    assert wide["a.weight"].equal(tensors(4.0)["a.weight"].double())


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda own: own | {"c": torch.zeros(1)}, r"2 tensors for 3 parameters; not published: \['c'\]"),
        (
            lambda own: {"a.weight": own["a.weight"]},
            r"2 tensors for 1 parameters; .*not bound: \['b.weight'\]",
        ),
        (lambda own: own | {"a.weight": torch.zeros(4, 8)}, r"a.weight is \(8, 4\), the parameter \(4, 8\)"),
    ],
)
def test_an_install_that_binds_other_tensors_changes_nothing(wrong: Any, says: str) -> None:
    box = Box(None)
    announcement = publish(box, tensors(4.0), version(1))
    own = wrong(parameters())
    with pytest.raises(WeightsMismatch, match=says):
        install(box, announcement, own)
    assert not any(tensor.any() for tensor in own.values())


def test_an_install_of_damaged_weights_is_an_error() -> None:
    box = Box(None)
    announcement = publish(box, tensors(4.0), version(1))
    assert box.payload is not None
    own = parameters()
    with pytest.raises(WeightsMismatch, match="digest"):
        install(Box(changed(box.payload)), announcement, own)
    assert not any(tensor.any() for tensor in own.values())
