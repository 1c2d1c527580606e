"""`score --engine ray`: the shards of a job over the workers of a Ray cluster, or of this machine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from fewshot_diti.commands.loading import check_can_choose, load_classifier
from fewshot_diti.commands.score_config import ScoreConfig
from fewshot_diti.evaluation.scored import BankScorer, remove_parts
from fewshot_diti.files import check_writable
from fewshot_diti.hub import saved_folder
from fewshot_diti.progress import Progress
from fewshot_diti.shards import Shard

_SHARDS = 64  # where the user says nothing
_RETRIES = 3  # of a shard whose worker died


class ShardWorker:
    """Holds a loaded bank and scores one shard after another; an actor of Ray.

    Raises:
        OSError, ValueError: bank or backbone cannot be loaded.
    """

    def __init__(self, config: ScoreConfig) -> None:
        bank = saved_folder(config.needed_bank)
        classifier = load_classifier(bank, config.backbone, config.dtype, config.batch_size, config.compile)
        check_can_choose(classifier, config.needed_bank)
        self._scorer, self._job = BankScorer(classifier, bank, config.options), config.job(bank)

    def score(self, shard: Shard) -> None:
        """Scores a shard, unless it is there."""
        images, listing = self._job.list(shard)
        if self._job.finished(shard, listing) is None:
            self._job.score(self._scorer, shard, images, listing)
        remove_parts(shard.file(self._job.folder))


def score_shards(config: ScoreConfig) -> None:
    """Scores all shards that are not there yet. Those that are done stay, whatever happens.

    Ray is the cluster that `RAY_ADDRESS` names, else this machine. There is a worker for each GPU, or where there are
    none for each CPU; all must see images, bank, backbone and output under the same absolute paths. A worker that dies
    is started again and goes on where it was.

    Raises:
        OSError, ValueError: Ray is not installed, as `ShardWorker` and `list_shard`, or a worker died again and again.
    """
    try:
        import ray
    except ImportError:
        raise ValueError(
            "engine='ray' needs Ray, which is not installed; run pip install 'fewshot-diti[ray]'."
        ) from None
    config = absolute(config)
    check_writable(config.folder)
    job, of = config.job(saved_folder(config.needed_bank)), config.shards or _SHARDS
    shards = [Shard(number, of) for number in range(1, of + 1)]
    listing = job.list(shards[0])[1]
    waiting = [shard for shard in shards if job.finished(shard, listing) is None]
    if not waiting:
        return
    mine = not ray.is_initialized()
    if mine:
        ray.init(include_dashboard=False, log_to_driver=False)
    try:
        with Progress(len(shards), "shards", "shard", initial=len(shards) - len(waiting)) as bar:
            for _ in _scored(ray, config, waiting):
                bar.update()
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, OSError | ValueError):
            raise error.cause from error
        raise
    except ray.exceptions.RayActorError as error:
        if isinstance(cause := getattr(error, "cause", None), OSError | ValueError):
            raise cause from error
        raise ValueError(
            f"A worker died {_RETRIES + 1} times ({error}); what is scored is kept. Look for the reason in Ray's log, "
            "and start the same command again."
        ) from error
    finally:
        if mine:
            ray.shutdown()


def absolute(config: ScoreConfig) -> ScoreConfig:
    """With absolute paths: a worker runs in a folder of its own."""

    def place(text: str) -> str:
        kind, colon, rest = text.partition(":")
        if kind == "manifest" and colon and not os.path.lexists(text):
            return f"manifest:{'@'.join(map(os.path.abspath, rest.rsplit('@', 1)))}"
        return os.path.abspath(text) if os.path.lexists(text) else text

    return replace(
        config,
        images=tuple(map(place, config.images)),
        bank=place(config.needed_bank),
        backbone=None if config.backbone is None else place(config.backbone),
        output=config.folder.absolute(),
    )


def _scored(ray: Any, config: ScoreConfig, shards: list[Shard]) -> Iterator[None]:
    """Scores the shards, each by the next worker that is free."""
    there = ray.cluster_resources()
    gpus = int(there.get("GPU", 0))
    wanted = {"num_gpus": 1} if gpus else {"num_cpus": 1}
    count = min(len(shards), gpus or int(there.get("CPU", 1)))
    worker = ray.remote(max_restarts=_RETRIES, max_task_retries=_RETRIES, **wanted)(ShardWorker)
    pool = ray.util.ActorPool([worker.remote(config) for _ in range(count)])
    yield from pool.map_unordered(lambda actor, shard: actor.score.remote(shard), shards)
