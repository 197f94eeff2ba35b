"""Our attention against its definition, and questions packed into rows: every continuation as likely as one by one."""

from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from cases.models import tensors
from conftest import Patch, save_tiny_model
from families import check_answers, drawn_questions, save
from hypothesis import given, settings
from hypothesis import strategies as st
from operations import Operations
from simulated_gpu import simulated_gpu
from torch import Tensor
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function

from wanda_dvc.engine import attention, questions
from wanda_dvc.engine import decoder as decoding
from wanda_dvc.engine import sequences as calls
from wanda_dvc.engine.attention import attend, mask_pairs, running_questions
from wanda_dvc.engine.decoder import Decoder
from wanda_dvc.engine.forward import ModelRunner
from wanda_dvc.engine.questions import Prediction, Request, loglikelihoods, one_per_sequence, pack_questions
from wanda_dvc.engine.sequences import PackedQuestions
from wanda_dvc.errors import UserError

MODULE = torch.nn.Module()


def heads(length: int, *, keys: int = 2, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, number, length, 8, generator=generator) for number in (6, keys, keys))
    return q, k, v


def oracle(q, k, v, sees, scale=8**-0.5, softcap=None):
    """By its definition, all tokens at once."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = scale * q @ k.mT
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    return (torch.where(sees, scores, -torch.inf).softmax(-1) @ v).transpose(1, 2)


@settings(max_examples=25)
@given(
    st.lists(st.tuples(st.integers(1, 5), st.lists(st.integers(0, 4), min_size=1, max_size=3)), min_size=1, max_size=3),
    st.sampled_from([None, 2, 5]),
    st.sampled_from([1, 2, 6]),
    st.sampled_from([None, 0.3]),
    st.sampled_from([None, 2.0]),
)
def test_a_token_sees_its_context_and_its_own_choice(
    questions: list[tuple[int, list[int]]], window: int | None, keys: int, scale: float | None, softcap: float | None
):
    places = [
        (question, choice, position)
        for question, (context, choices) in enumerate(questions)
        for choice, size in enumerate([context, *choices])
        for position in range(0 if choice == 0 else context, size if choice == 0 else context + size)
    ]
    question, choice, positions = (torch.tensor(column) for column in zip(*places, strict=True))
    sees = [[q == r and d in (0, c) and 0 <= p - e < (window or 99) for r, d, e in places] for q, c, p in places]
    q, k, v = heads(len(places), keys=keys)
    kind = causal_mask_function if window is None else sliding_window_causal_mask_function(window)
    running_questions.set(PackedQuestions(positions, question, choice))
    mask = mask_pairs(1, len(places), len(places), kind, "cpu", attention_mask=None, allow_is_causal_skip=True)
    ours, _ = attend(MODULE, q, k, v, mask, scaling=scale, softcap=softcap)
    expected = oracle(q, k, v, torch.tensor(sees), scale or 8**-0.5, softcap)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    with simulated_gpu():
        mask = mask_pairs(1, len(places), len(places), kind, "cuda", attention_mask=None, allow_is_causal_skip=True)
        assert mask.cpu().view(len(places), -1).tolist() == sees
        on_gpu, _ = attend(MODULE, q.to("cuda"), k.to("cuda"), v.to("cuda"), mask, scaling=scale, softcap=softcap)
    torch.testing.assert_close(on_gpu.cpu(), expected, rtol=1e-5, atol=1e-5)


def blind(module: torch.nn.Module, q: Tensor, k: Tensor, v: Tensor, _: Tensor, **words: Any) -> tuple[Tensor, None]:
    """Ignores the sliding window."""
    return attend(module, q, k, v, mask_pairs(1, 1, 1, causal_mask_function, q.device), **words)


def larger(module: torch.nn.Module, *given: Any, **words: Any) -> tuple[Tensor, None]:
    """Wrong by a few percent, in some heads."""
    out, _ = attend(module, *given, **words)
    return out * torch.linspace(0.97, 1.03, out.shape[2])[:, None].to(out.dtype), None


def second(module: torch.nn.Module, *given: Any, **words: Any) -> tuple[Tensor, None]:
    """Wrong in the second of two kinds of blocks, which alternate."""
    out, _ = attend(module, *given, **words)
    return out * (module.layer_idx != 1), None


@pytest.mark.parametrize("wrong", [blind, second, larger])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attention_that_is_wrong_a_little_is_found(tmp_path: Path, monkeypatch: Patch, wrong: Any, dtype: torch.dtype):
    folder = save("gemma2", tmp_path / "model", sliding_window=200, max_position_embeddings=512)
    decoder = Decoder(folder, dtype=dtype, device=torch.device("cpu"))
    assert decoder.packs_questions
    assert decoder.model.config.sliding_window == 200
    monkeypatch.setitem(AttentionInterface._global_mapping, attention.NAME, wrong)
    assert not Decoder(folder, dtype=dtype, device=torch.device("cpu")).packs_questions


def test_attention_with_more_than_a_mask_stays_the_models_own(tmp_path: Path):
    """With sinks near nothing, no result on a short row would show that ours has none."""
    folder = save("gpt_oss", tmp_path / "model")
    sinks: list[Tensor] = []
    tensors(lambda x: sinks.extend(weight.fill_(-30) for name, weight in x.items() if name.endswith("sinks")))(folder)
    assert len(sinks) == 3
    assert not Decoder(folder, dtype=torch.float32, device=torch.device("cpu")).packs_questions
    q = torch.zeros(1, 2, 4, 8)
    more: dict[str, Any] = {"s_aux": torch.zeros(2), "position_bias": torch.zeros(2, 4, 4)}
    with pytest.raises(ValueError, match="attention with s_aux, position_bias$"):
        attention.attend(torch.nn.Module(), q, q, q, torch.zeros(0), **more, position_ids=torch.zeros(1, 4))


CPU = torch.device("cpu")
Drawn = list[tuple[tuple[int, ...], tuple[int, ...]]]
token_lists = st.lists(st.integers(3, 6), min_size=1, max_size=4).map(tuple)
requests = st.lists(st.tuples(token_lists, token_lists), min_size=1, max_size=12)


def places_of(asked: list[Request], predictions: list[list[Prediction]]) -> list[tuple[int, list[int]]]:
    """The sequence of each request, and the positions there that predict its continuation."""
    places: list[tuple[int, list[int]]] = []
    for number, request in enumerate(asked):
        (sequence,) = [place for place, some in enumerate(predictions) if number in [x.request for x in some]]
        own = [prediction for prediction in predictions[sequence] if prediction.request == number]
        assert tuple(prediction.target for prediction in own) == request.continuation
        places.append((sequence, [prediction.position for prediction in own]))
    return places


@given(requests, st.integers(1, 20))
def test_a_sequence_holds_each_context_once_and_every_prediction_has_its_place(drawn: Drawn, tokens: int):
    asked = [Request(*pair) for pair in drawn]
    sequences, predictions = pack_questions(asked, limit=tokens)
    inputs = sum(len(sequence.tokens) for sequence in sequences)
    asked_of = Counter[tuple[int, ...]]()  # inputs of its continuations, by context
    for request in asked:
        asked_of[request.context] += len(request.continuation) - 1
    continuations = {(request.context, request.continuation[:-1]) for request in asked}
    least = sum(map(len, asked_of)) + sum(len(continuation) for _, continuation in continuations)
    if max(asked_of.values()) < tokens:
        assert inputs == least
    else:  # a context is there again after as many tokens as a sequence has
        assert least <= inputs <= sum(len(x) * (1 + asked_of[x] // tokens) + asked_of[x] for x in asked_of)
    for request, (number, positions) in zip(asked, places_of(asked, predictions), strict=True):
        sequence = sequences[number]
        assert sequence.questions is not None
        context, *rest = positions
        # What a prediction can look back on is what it would be alone: context, then its continuation.
        seen = [*range(context - len(request.context) + 1, context + 1), *rest]
        assert tuple(sequence.tokens[seen].tolist()) == request.context + request.continuation[:-1]
        assert sequence.questions.positions[seen].tolist() == list(range(len(seen)))
        assert len(set(sequence.questions.question[seen].tolist())) == 1
        assert len(set(sequence.questions.choice[rest].tolist())) <= 1
    for sequence in sequences:
        assert sequence.questions is not None
        several = len(set(sequence.questions.question.tolist())) > 1
        assert len(sequence.tokens) <= tokens or not several


@given(requests)
def test_equal_inputs_are_one_sequence(drawn: Drawn):
    asked = [Request(*pair) for pair in drawn]
    sequences, predictions = one_per_sequence(asked)
    assert len(sequences) == len({request.context + request.continuation[:-1] for request in asked})
    for request, (number, positions) in zip(asked, places_of(asked, predictions), strict=True):
        assert tuple(sequences[number].tokens.tolist()) == request.context + request.continuation[:-1]
        assert positions == list(range(len(request.context) - 1, len(sequences[number].tokens)))


def test_rounding_over_many_blocks_is_no_reason_to_run_questions_one_by_one(tmp_path: Path):
    decoder = Decoder(save_tiny_model(tmp_path / "deep", num_hidden_layers=40), dtype=torch.bfloat16, device=CPU)
    assert decoder.packs_questions
    del decoder.packs_questions
    decoder.model.config.rope_parameters["rope_type"] = "longrope"  # its angles follow from the row's last position
    assert not decoder.packs_questions


def test_a_trial_without_memory_fails_instead_of_giving_up_packed_questions(tiny: Path, monkeypatch: Patch):
    decoder = Decoder(tiny, dtype=torch.float32, device=CPU)
    of_cpu = RuntimeError("DefaultCPUAllocator: can't allocate memory")
    for error in (torch.OutOfMemoryError("CUDA out of memory"), of_cpu):
        monkeypatch.setattr(decoder, "run", mock.Mock(side_effect=error))
        with pytest.raises(type(error), match="memory"):
            bool(decoder.packs_questions)
    monkeypatch.setattr(decoder, "run", mock.Mock(side_effect=RuntimeError("shapes differ")))
    assert not decoder.packs_questions


def greedy_questions(folder: Path) -> list[Request]:
    """Of each context, what greedy decoding gives, and the same after another first token, which it does not give."""
    model, made = AutoModelForCausalLM.from_pretrained(folder), list[Request]()

    def decoded(*context: int) -> tuple[int, ...]:
        inputs = torch.tensor([context])
        return tuple(model.generate(inputs, max_new_tokens=2, min_new_tokens=2, do_sample=False)[0, -2:].tolist())

    for context in ((20, 30, 40), (50, 60)):
        first, second = decoded(*context)
        other = 70 if first != 70 else 80
        made += [Request(context, (first, second)), Request(context, (other, *decoded(*context, other)))]
    return made


@pytest.mark.parametrize("row", [30, 2048])
@pytest.mark.parametrize("together", [True, False])
def test_they_are_the_models_own(tiny: Path, tmp_path: Path, monkeypatch: Patch, row: int, together: bool):
    monkeypatch.setattr(questions, "SEQUENCE_TOKENS", row)
    monkeypatch.setattr(decoding, "LOGITS_AT_A_TIME", 260 * 5)
    decoder = Decoder(tiny, dtype=torch.float32, device=CPU)
    assert decoder.packs_questions
    decoder.packs_questions = together
    asked = [*drawn_questions(), *greedy_questions(tiny)]
    ours = loglikelihoods(ModelRunner(decoder, tmp_path), asked, length=64, progress=iter)
    check_answers(tiny, asked, ours, length=64)
    assert [greedy for _, greedy in ours[-4:]] == [True, False, True, False]
    for wrong, length in ((asked, 2), ([Request((1, 2), ())], 64)):
        with pytest.raises(UserError, match=f"a choice has no token, or more than the model's {length}; remove it"):
            loglikelihoods(ModelRunner(decoder, tmp_path), wrong, length=length, progress=iter)


def test_items_without_a_context_of_their_own_are_several_questions(monkeypatch: Patch):
    """BLiMP's and XNLI's: all of a task have the context of a BOS token, and attention takes a question's square."""
    monkeypatch.setattr(questions, "SEQUENCE_TOKENS", 60)
    asked = [Request((1,), (number, 5, 6, 7)) for number in range(100)]
    sequences, predictions = pack_questions(asked, limit=60)
    lengths = [part.stop - part.start for one in sequences if one.questions for part in one.questions.slices]
    assert max(lengths) <= 1 + 60 + 3
    inputs = [sequences[number].tokens[positions].tolist() for number, positions in places_of(asked, predictions)]
    assert inputs == [[1, number, 5, 6] for number in range(100)]


def questions_of(number: int, task: str = "a task") -> list[Request]:
    """Questions of ten tokens with two choices of three."""
    drawn = torch.randint(3, 256, (number, 16), generator=torch.Generator().manual_seed(number)).tolist()
    choices = (slice(10, 13), slice(13, 16))
    return [Request(tuple(row[:10]), tuple(row[choice]), task) for row in drawn for choice in choices]


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_a_gpu_starts_as_many_operations_for_few_questions_as_for_many(tmp_path: Path, softcap: float | None):
    """The host waits for each; the loop over questions of a CPU would take longer than the attention."""
    config: dict[str, Any] = {"attn_logit_softcapping": softcap} if softcap else {}
    folder = save("gemma2" if softcap else "llama", tmp_path / "model", max_position_embeddings=512, **config)
    counts = []
    for number in (6, 24):
        with simulated_gpu():
            decoder = Decoder(folder, dtype=torch.float32, device=torch.device("cuda"))
            assert decoder.packs_questions
            runner = ModelRunner(decoder, tmp_path / str(number))
            with Operations() as operations:
                loglikelihoods(runner, questions_of(number), length=512, progress=iter)
        counts.append(operations.counts)
    assert len(runner.chunks) == 1
    assert counts[0] == counts[1]


def test_tasks_that_run_together_have_the_bits_that_they_have_alone(tiny: Path, tmp_path: Path, monkeypatch: Patch):
    monkeypatch.setattr(questions, "SEQUENCE_TOKENS", 60)
    decoder = Decoder(tiny, dtype=torch.float32, device=CPU)
    tasks = [questions_of(number, f"{number} questions") for number in (2, 18, 3)]
    shared = [Request(request.context, request.continuation, "shared") for request in tasks[1]]  # no context twice
    for packs in (True, False):
        decoder.packs_questions = packs
        answers, chunks = list[tuple[float, bool]](), list[list[list[int]]]()
        for number, task in enumerate([*tasks, shared]):
            runner = ModelRunner(decoder, tmp_path / f"{packs} {number}")
            answers += loglikelihoods(runner, task, length=64, progress=iter)
            chunks += tokens_of(runner)
        runner = ModelRunner(decoder, tmp_path / f"{packs}")
        asked = [request for task in [*tasks, shared] for request in task]
        assert loglikelihoods(runner, asked, length=64, progress=iter) == answers
        assert tokens_of(runner) == chunks  # on other CPUs, products of other sizes have other bits


def tokens_of(runner: ModelRunner) -> list[list[list[int]]]:
    return [[sequence.tokens.tolist() for sequence in chunk.sequences] for chunk in runner.chunks]


@pytest.mark.parametrize("budget", [0, 50_000])
def test_calls_that_are_recorded_again_change_no_answer(tiny: Path, tmp_path: Path, monkeypatch: Patch, budget: int):
    monkeypatch.setattr(questions, "SEQUENCE_TOKENS", 60)
    drawn = torch.randint(3, 256, (60, 20), generator=torch.Generator().manual_seed(2)).tolist()  # 15 rows of 60 tokens
    many = [Request(tuple(row[:12]), tuple(row[12 : 14 + choice])) for row in drawn for choice in range(2)]
    cached, bounded = (Decoder(tiny, dtype=torch.float32, device=CPU) for _ in range(2))
    answers = loglikelihoods(ModelRunner(cached, tmp_path / "cached"), many, length=64, progress=iter)
    bounded._arguments_memory = budget
    assert loglikelihoods(ModelRunner(bounded, tmp_path / "bounded"), many, length=64, progress=iter) == answers
    assert not bounded._arguments  # freed before the logits


def test_calls_are_recorded_again_only_where_they_do_not_fit(tiny: Path, monkeypatch: Patch):
    """60, 30 and 10 bytes fit into 100; 20 and 40 don't, and of those the last is there once more."""
    decoder, recorded = Decoder(tiny, dtype=torch.float32, device=CPU), list[int]()
    decoder._arguments_memory = 100

    def record(row: calls.TokenSequence, _: int) -> list[decoding.Arguments]:
        recorded.append(len(row.tokens))
        table = torch.zeros(len(row.tokens), dtype=torch.uint8)
        return [((table,), {"shared": (table, table[:5])}), ((), {"mask": None})]

    monkeypatch.setattr(decoder, "_record_arguments", record)
    for _ in range(2):
        for length in (60, 30, 20, 20, 40, 10):
            decoder.block_arguments(calls.TokenSequence(torch.zeros(length, dtype=torch.long)))
    for _ in range(2):  # packed questions have their own, as those of the same content
        packed = PackedQuestions(*torch.zeros(3, 10, dtype=torch.long))
        decoder.block_arguments(calls.TokenSequence(torch.zeros(10, dtype=torch.long), packed))
    assert Counter(recorded) == {60: 1, 30: 1, 20: 2, 40: 2, 10: 2}  # of 10: the sequence, and the questions
