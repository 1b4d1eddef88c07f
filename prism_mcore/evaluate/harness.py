"""lm_eval's tasks on our engine: log-likelihoods and generation, tensor- and data-parallel.

Every rank runs lm_eval alike, builds the same requests and gets every answer; what they are asked is shared out here,
over data-parallel ranks, and the first rank writes. So lm_eval knows of one process: it pads no requests, and none of
its guesses at ranks (LOCAL_RANK, which every node has) matters. lm_eval 0.4.13, of the extra `lm-eval`.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from lm_eval import simple_evaluate
from lm_eval import utils as lm_eval_utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.loggers import EvaluationTracker
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from rich.table import Table

from prism_mcore import platform
from prism_mcore.console import progress_bar, show
from prism_mcore.convert.online import agreed, model_from_hf
from prism_mcore.evaluate.continuations import Score, score_continuations
from prism_mcore.evaluate.runner import named_failures
from prism_mcore.evaluate.settings import EvaluateSettings, HarnessSettings
from prism_mcore.generate import unfinished
from prism_mcore.generate.engine import Engine
from prism_mcore.generate.prompts import tokenizer_of
from prism_mcore.generate.requests import Request
from prism_mcore.generate.settings import Sampling
from prism_mcore.meeting import Meeting
from prism_mcore.model.spec import read_spec
from prism_mcore.parallel import Groups, init_groups
from prism_mcore.plan import report
from prism_mcore.text import CLOSE, Tokenizer, before_stop, read_eos

MAX_GEN_TOKENS = 256  # where a task says nothing, as in lm_eval's own models
CPU_PASS = 2048  # tokens of a pass on a CPU, whose caches more of them leave: 8,192 take 8% longer
KNOWN = {"do_sample", "temperature", "top_p", "top_k", "until", "max_gen_toks"}  # of a task's generation

Item = TypeVar("Item")
Answer = TypeVar("Answer")


class EngineLM(TemplateLM):
    """lm_eval's view of an Engine.

    after_think: stop texts and what is graded are of what follows </think>. seed: of sampled generations, which depend
    on it, on the context and on how often that has been asked before, and on nothing else.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        groups: Groups,
        meeting: Meeting,
        *,
        after_think: bool = False,
        seed: int = 0,
    ):
        super().__init__()
        self.engine, self.text, self.groups, self.meeting = engine, tokenizer, groups, meeting
        self.after_think, self.seed = after_think, seed
        ends = [tokenizer.eos_id, *engine.eos]
        self._eot = next((token for token in ends if token is not None), None)

    # What lm_eval asks of a model.

    @property
    def eot_token_id(self) -> int:
        if self._eot is None:
            raise ValueError(f"{self.text.source} names no end-of-sequence token, which lm_eval needs")
        return self._eot

    @property
    def prefix_token_id(self) -> int:
        """What a text without context begins with: BOS where there is one."""
        bos = self.text.id_of(self.text.named["bos_token"]) if "bos_token" in self.text.named else None
        return self.eot_token_id if bos is None else bos

    @property
    def max_length(self) -> int:
        return self.engine.context

    @property
    def tokenizer_name(self) -> str:
        return self.text.sha256

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self.text.chat_template if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self.text.render(chat_history, add_generation_prompt=add_generation_prompt)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        if add_special_tokens is None:
            bos = self.text.named.get("bos_token")
            add_special_tokens = not (bos and string.startswith(bos))
        return self.text.encode(string) if add_special_tokens else self.text.encode_plain(string)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        longest = self.max_length + 1  # the last token is only predicted
        pairs = []
        for _texts, context, continuation in requests:
            if not continuation or len(continuation) > self.max_length:
                raise ValueError(f"a continuation of {len(continuation)} tokens; needed: 1 to {self.max_length:,}")
            pairs.append((context[-(longest - len(continuation)) :], continuation))
        return [(score.logprob, score.greedy) for score in self._shared(pairs, self._score, "log-likelihoods")]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Each text alone, every token predicted once, the last window with all the context that fits."""
        pairs, counts = [], []
        for (text,) in (request.args for request in requests):
            windows = lm_eval_utils.get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            made = [lm_eval_utils.make_disjoint_window(window) for window in windows]
            pairs += made
            counts.append(len(made))
        scores = iter(self._shared(pairs, self._score, "log-likelihoods"))
        return [sum(next(scores).logprob for _ in range(count)) for count in counts]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        asked = [(context, tuple(sorted(self._kwargs(how).items()))) for context, how in (r.args for r in requests)]
        before: Counter[Any] = Counter()
        numbered = []
        for item in asked:
            numbered.append((*item, before[item]))
            before[item] += 1
        return self._shared(numbered, self._generate, "generations")

    def get_model_info(self) -> dict[str, Any]:
        """For lm_eval's results."""
        spec, parallel = self.engine.model.spec, self.groups
        return {
            "model": "prism_mcore",
            "model_family": spec.family,
            "tensor_parallel": parallel.tp_size,
            "data_parallel": parallel.dp_size,
            "model_dtype": str(next(self.engine.model.parameters()).dtype),
        }

    # Work shared out over data-parallel ranks.

    def _shared(
        self, items: Sequence[Item], work: Callable[[Sequence[Item], Callable[[int], None]], list[Answer]], what: str
    ) -> list[Answer]:
        """Answers to all items, on every rank."""
        mine = range(self.groups.dp_rank, len(items), self.groups.dp_size)
        shown = self.groups.rank == 0
        with named_failures(self.groups), progress_bar(what, len(mine), shown=shown) as advance:
            answers = work([items[place] for place in mine], advance)
        self.meeting.join()  # replicas take unequally long
        everyone: list[Any] = [None] * self.groups.world_size
        here = dict(zip(mine, answers, strict=True)) if self.groups.tp_rank == 0 else {}
        dist.all_gather_object(everyone, here)
        found = {place: answer for part in everyone for place, answer in part.items()}
        return [found[place] for place in range(len(items))]

    def _score(self, pairs: Sequence[tuple[list[int], list[int]]], advance: Callable[[int], None]) -> list[Score]:
        def before_pass(count: int) -> None:
            self.meeting.working()
            advance(count)

        replica = self.engine.replica
        tokens = min(replica.settings.prefill_tokens, CPU_PASS) if replica.device.type == "cpu" else None
        tokens = tokens or replica.settings.prefill_tokens
        return score_continuations(self.engine.model, pairs, pass_tokens=tokens, before_pass=before_pass)

    def _generate(self, asked: Sequence[tuple[str, tuple, int]], advance: Callable[[int], None]) -> list[str]:
        """Generations that are sampled alike run together."""
        texts: dict[int, str] = {}
        kinds: dict[tuple, list[int]] = {}
        for place, (_, how, _) in enumerate(asked):
            kinds.setdefault(how, []).append(place)
        for how, places in kinds.items():
            sampling = self._sampling(dict(how))
            room = self.max_length - sampling.max_tokens
            if room < 1:
                raise ValueError(
                    f"max_gen_toks={sampling.max_tokens:,}; needed: fewer than {self.max_length:,} positions"
                )
            requests = []
            for place in places:
                context, _, repeat = asked[place]
                tokens = self.tok_encode(context)[-room:] or [self.prefix_token_id]
                number = int.from_bytes(hashlib.sha256(context.encode()).digest()[:8], "little")
                requests.append(Request(tuple(tokens), ((self.seed, 0, number, repeat),)))
            for completion in self.engine.stream(requests, sampling, self.meeting.working):
                texts[places[completion.request]] = self._text(completion.tokens, sampling.stop)
                advance(1)
        return [texts[place] for place in range(len(asked))]

    def _text(self, tokens: Sequence[int], stop: Sequence[str]) -> str:
        if self.after_think:
            answer = self.text.decode(tokens, special=True).rpartition(CLOSE)[2]
            ends = [self.text.decode([token], special=True) for token in self.text.special_ids]
            return before_stop(answer, [*stop, *filter(None, ends)]).lstrip()
        return before_stop(self.text.decode(tokens), stop)

    @staticmethod
    def _kwargs(how: dict[str, Any]) -> dict[str, Any]:
        """A task's generation settings, normalised, hashable. Raises ValueError for one that we do not have."""
        found = dict(normalize_gen_kwargs(how, MAX_GEN_TOKENS))
        if strange := sorted(found.keys() - KNOWN):
            raise ValueError(
                f"a task asks for generation with {', '.join(strange)}; known are {', '.join(sorted(KNOWN))}"
            )
        return found | {"until": tuple(found.get("until") or ())}

    def _sampling(self, how: dict[str, Any]) -> Sampling:
        return Sampling(
            temperature=float(how.get("temperature", 1.0)) if how.get("do_sample") else 0.0,
            top_p=float(how.get("top_p", 1.0)),
            top_k=int(how.get("top_k", 0)),
            max_tokens=how["max_gen_toks"],
            stop=[text for text in how["until"] if text],
            stop_in_think=not self.after_think,
            seed=self.seed,
        )


def run(hf: Path, out: Path, settings: EvaluateSettings, tasks: Sequence[str]) -> None:
    """Run lm_eval's tasks on the model in `hf`; results and samples go to `out` in lm_eval's own format.

    Every rank calls it. Raises ValueError for tasks that lm_eval does not know, and as evaluate/runner.py does.
    """
    manager = task_manager(tasks, settings.harness)
    device = platform.start(timeout=settings.parallel.timeout)
    groups = init_groups(settings.parallel)
    meeting = Meeting.of_all_ranks(settings.parallel.timeout)
    with ExitStack() as opened:
        with agreed():
            if groups.rank == 0:
                out.mkdir(exist_ok=True)
                unfinished.hold(out, opened)
        tokenizer = tokenizer_of(hf, read_spec(hf))
        assert tokenizer is not None, "the launcher has looked for one"
        (model,) = model_from_hf(hf, settings, groups, device)
        engine = Engine(model, tokenizer, settings=settings.generate, eos=read_eos(hf))
        after_think, seed = settings.harness.after_think, settings.sampling.seed
        lm = EngineLM(engine, tokenizer, groups, meeting, after_think=after_think, seed=seed)
        results = ask(lm, tasks, manager, settings.harness, str(hf), out)
        if results is not None:
            show(table_of(results))
        dist.barrier()
    platform.shutdown()


def task_manager(tasks: Sequence[str], how: HarnessSettings) -> TaskManager:
    """lm_eval's tasks, and those of a folder. Raises ValueError for one that is neither."""
    if how.include is not None and not Path(how.include).is_dir():
        raise ValueError(f"harness.include={how.include}: there is no such folder")
    manager = TaskManager(include_path=how.include)
    if unknown := [task for task in tasks if task not in manager.all_tasks]:
        raise ValueError(f"--lm-eval {unknown[0]}: lm_eval has no such task; harness.include names a folder of yours")
    return manager


def ask(
    lm: EngineLM, tasks: Sequence[str], manager: TaskManager, how: HarnessSettings, name: str, out: Path
) -> dict[str, Any] | None:
    """Run the tasks; the first rank saves what `lm_eval --output_path OUT --log_samples` does, and gets the results.

    name: of the model, and so of its folder in `out`.
    """
    tracker = EvaluationTracker(output_path=str(out))
    results = simple_evaluate(
        model=lm,
        model_args={"pretrained": name},
        tasks=list(tasks),
        task_manager=manager,
        evaluation_tracker=tracker,
        num_fewshot=how.num_fewshot,
        limit=how.limit,
        apply_chat_template=how.chat_template,
        log_samples=True,
    )
    if lm.groups.rank > 0:
        return None
    samples = results.pop("samples")
    tracker.save_results_aggregated(results=results, samples=samples)
    for task in results["configs"]:
        tracker.save_results_samples(task_name=task, samples=samples[task])
    return results


def table_of(results: dict[str, Any]) -> Table:
    """Metrics of each task with lm_eval's standard errors."""
    rows = []
    for task, found in results["results"].items():
        for key, value in found.items():
            metric, _, kind = key.partition(",")
            error = found.get(f"{metric}_stderr,{kind}")
            if kind and not metric.endswith("_stderr") and isinstance(value, int | float):
                rows.append((task, metric, kind, f"{value:.4f}", f"{error:.4f}" if isinstance(error, float) else ""))
    return report.numbers("", ("task", "metric", "filter", "value", "stderr"), rows)
