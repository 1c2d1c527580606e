"""`score --engine ray`: the shards of a job over the workers of a Ray cluster, or of this machine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fewshot_diti.commands.loading import check_can_choose, load_classifier
from fewshot_diti.commands.score_config import ScoreConfig
from fewshot_diti.data.unlabelled import list_shard
from fewshot_diti.evaluation.scored import BankScorer, made_with, remove_parts
from fewshot_diti.hub import saved_folder
from fewshot_diti.progress import Progress
from fewshot_diti.shards import Shard, finished

_RETRIES = 3  # of a shard whose worker died


class ShardWorker:
    """Holds a loaded bank and scores one shard after another; an actor of Ray.

    Raises:
        OSError, ValueError: bank or backbone cannot be loaded.
    """

    def __init__(self, config: ScoreConfig) -> None:
        self.config = config
        self._bank = saved_folder(config.needed_bank)
        classifier = load_classifier(self._bank, config.backbone, config.dtype, config.batch_size, config.compile)
        check_can_choose(classifier, config.needed_bank)
        self._scorer = BankScorer(classifier, self._bank, config.rows)

    def score(self, shard: Shard) -> None:
        """Scores a shard, unless it is there."""
        config = self.config
        made_by = made_with(self._bank, config.dtype, config.rows)
        if finished(config.folder, shard, made_by) is None:
            images, listing = list_shard(config.images, shard, config.split, config.image_column)
            self._scorer.score_shard(images, listing, config.folder, shard, made_by)
        remove_parts(shard.file(config.folder))


def score_shards(config: ScoreConfig) -> None:
    """Scores all shards that are not there yet. Those that are done stay, whatever happens.

    Ray is the cluster that `RAY_ADDRESS` names, else this machine. There is a worker for each GPU, or where there are
    none for each CPU; all must see images, bank, backbone and output under the same paths. A worker that dies is
    started again and goes on where it was.

    Raises:
        OSError, ValueError: Ray is not installed, as `ShardWorker` and `list_shard`, or a worker died again and again.
    """
    try:
        import ray
    except ImportError:
        raise ValueError(
            "engine='ray' needs Ray, which is not installed; run pip install 'fewshot-diti[ray]'."
        ) from None
    made_by = made_with(saved_folder(config.needed_bank), config.dtype, config.rows)
    shards = [Shard(number, config.shards) for number in range(1, config.shards + 1)]
    waiting = [shard for shard in shards if finished(config.folder, shard, made_by) is None]
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


def _scored(ray: Any, config: ScoreConfig, shards: list[Shard]) -> Iterator[None]:
    """Scores the shards, each by the next worker that is free."""
    there = ray.cluster_resources()
    gpus = int(there.get("GPU", 0))
    wanted = {"num_gpus": 1} if gpus else {"num_cpus": 1}
    count = min(len(shards), gpus or int(there.get("CPU", 1)))
    worker = ray.remote(max_restarts=_RETRIES, max_task_retries=_RETRIES, **wanted)(ShardWorker)
    pool = ray.util.ActorPool([worker.remote(config) for _ in range(count)])
    yield from pool.map_unordered(lambda actor, shard: actor.score.remote(shard), shards)
