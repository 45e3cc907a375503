"""What an evaluation asks: samples of all its cells, in all its settings, but what is answered."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import batched, product

from megatron_star.config import StarConfig
from megatron_star.engine.request import StarRequest, StarResult
from megatron_star.evaluation.results import ScoredAnswer
from megatron_star.evaluation.sample import Sample, greedy_request
from megatron_star.evaluation.scoring import MATCHING
from megatron_star.evaluation.setting_text import encoded_as
from megatron_star.evaluation.tasks import NamedTask, SampleKey, SampleMaker
from megatron_star.planning.planner import PlannedContext


@dataclass(frozen=True)
class Question:
    """A sample for one setting, as a request."""

    sample: Sample
    setting: str
    matching: str
    request: StarRequest

    @property
    def id(self) -> str:
        """Of its answer."""
        return answer_id(self.setting, self.sample.id)

    def scored(
        self,
        result: StarResult,
        planned: PlannedContext,
        *,
        model: str,
        chat: bool,
        seconds: float,
        flops: float,
    ) -> ScoredAnswer:
        """The line for its answer; see `ScoredAnswer`.

        Args:
            flops: of the encoding of the context on the slowest rank.
        """
        sample = self.sample
        return ScoredAnswer(
            id=self.id,
            sample=sample.id,
            setting=self.setting,
            model=model,
            chat=chat,
            task=sample.task,
            length=sample.length,
            seed=sample.seed,
            index=sample.index,
            depth=sample.depth,
            references=sample.references,
            text=result.text,
            tokens=result.tokens,
            score=MATCHING[self.matching](result.text, sample.references),
            num_context_tokens=result.num_context_tokens,
            num_query_tokens=result.num_query_tokens,
            num_blocks=result.num_blocks,
            seconds=seconds,
            encoded_as=encoded_as(self.request.star, planned.star),
            encoding_flops=flops,
            cache_hit=result.cache_hit,
        )


def answer_id(setting: str, sample_id: str) -> str:
    """Unique in a file."""
    return f"{setting}/{sample_id}"


@dataclass(frozen=True, kw_only=True)
class Survey:
    """Every task at every length and depth, a cell, and every setting for each sample of it.

    Attributes:
        num_samples: of each cell.
        settings: by their names.
    """

    tasks: Sequence[NamedTask]
    lengths: Sequence[int]
    depths: Sequence[float | None]
    num_samples: int
    seed: int
    settings: Mapping[str, StarConfig]

    def num_open(self, finished: Collection[str]) -> int:
        """Answers that are still to come."""
        return sum(
            answer_id(setting, key.id) not in finished
            for cell in self._cells()
            for key, setting in product(cell, self.settings)
        )

    def first_questions(self, maker: SampleMaker) -> Iterator[Question]:
        """Those about the first sample of each cell, so that mistakes show at the start.

        Raises:
            ValueError, OSError: a sample cannot be made.
        """
        for first, *_ in self._cells():
            sample = maker.make(first)
            for setting in self.settings:
                yield self._question(first, sample, setting, maker)

    def open_questions(
        self, maker: SampleMaker, finished: Collection[str], batch_size: int
    ) -> Iterator[list[Question]]:
        """Batches of one setting each; a batch of samples is asked in all settings before the next batch.

        Raises:
            ValueError, OSError: a sample cannot be made.
        """
        for cell in self._cells():
            for batch in batched(cell, batch_size):
                samples: dict[SampleKey, Sample] = {}
                for setting in self.settings:
                    wanted = [key for key in batch if answer_id(setting, key.id) not in finished]
                    samples |= {key: maker.make(key) for key in wanted if key not in samples}
                    if wanted:
                        yield [self._question(key, samples[key], setting, maker) for key in wanted]

    def _cells(self) -> Iterator[list[SampleKey]]:
        """The samples of each cell."""
        for task, length, depth in product(self.tasks, self.lengths, self.depths):
            yield [SampleKey(task, length, index, self.seed, depth) for index in range(self.num_samples)]

    def _question(self, key: SampleKey, sample: Sample, setting: str, maker: SampleMaker) -> Question:
        request = greedy_request(maker.tokenizer, sample, self.settings[setting], chat=maker.chat)
        return Question(sample, setting, key.named.task.matching, request)
