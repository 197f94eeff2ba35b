"""Log-likelihoods of continuations: a context runs once for all its continuations, many questions in one sequence.

A request is about one continuation of a context. A question is a context with all its continuations, or choices.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from operator import itemgetter
from typing import NamedTuple

import torch

from wanda_dvc.engine.decoder import Decoder
from wanda_dvc.engine.forward import BlockStep, ModelRunner
from wanda_dvc.engine.sequences import Hidden, PackedQuestions, TokenSequence
from wanda_dvc.errors import UserError

SEQUENCE_TOKENS = 2048  # of questions: large multiplications, small activations

ShowProgress = Callable[[Iterator[BlockStep]], Iterable[BlockStep]]
Tokens = tuple[int, ...]
# A context; by continuation, without its last token, which is no input, the indices of the requests.
Question = tuple[Tokens, dict[Tokens, list[int]]]


class Request(NamedTuple):
    """A request for the log-likelihood of a continuation after a context. Token ids, at least one each."""

    context: Tokens
    continuation: Tokens
    task: str = "a task"


class Prediction(NamedTuple):
    """A token to predict."""

    position: int  # in its sequence, of the token before it
    request: int  # its index
    target: int  # the token's id


def pack_questions(requests: Sequence[Request], *, limit: int) -> tuple[list[TokenSequence], list[list[Prediction]]]:
    """Return sequences of complete questions of one task, as many as fit into `limit` tokens, and their predictions.

    The items of a task without contexts, such as XNLI, share one context: they become several questions of about
    `limit` tokens, because attention takes the square of a question.
    """
    questions: dict[tuple[str, Tokens, int], dict[Tokens, list[int]]] = {}
    continued = Counter[tuple[str, Tokens]]()  # tokens of the continuations so far, by task and context
    for index, request in enumerate(requests):
        continuation, key = request.continuation[:-1], (request.task, request.context)
        indices = questions.setdefault((*key, continued[key] // limit), {})
        indices.setdefault(continuation, []).append(index)
        continued[key] += len(continuation)

    groups: list[list[Question]] = []
    size, last = 0, ""  # of the last group: its tokens, its task
    for (task, context, _), indices in questions.items():
        tokens = len(context) + sum(map(len, indices))
        if not groups or task != last or size + tokens > limit:
            groups.append([])
            size, last = 0, task
        groups[-1].append((context, indices))
        size += tokens
    joined = [join_questions(group, requests) for group in groups]
    return [sequence for sequence, _ in joined], [predictions for _, predictions in joined]


def join_questions(
    questions: Sequence[Question], requests: Sequence[Request]
) -> tuple[TokenSequence, list[Prediction]]:
    """Return a sequence of some questions, each its context and then its continuations, and their predictions."""
    tokens: list[int] = []
    places: list[tuple[int, int, int]] = []  # of each token: its position, question and choice, as in PackedQuestions
    predictions: list[Prediction] = []
    for number, (context, indices_of) in enumerate(questions):
        end = len(context)
        tokens += context
        places += [(position, number, 0) for position in range(end)]
        last_of_context = len(tokens) - 1  # predicts the first token of each choice
        for choice, (continuation, indices) in enumerate(indices_of.items(), start=1):
            positions = [last_of_context, *range(len(tokens), len(tokens) + len(continuation))]
            tokens += continuation
            places += [(end + offset, number, choice) for offset in range(len(continuation))]
            for index in indices:
                predictions += predictions_of(index, positions, requests[index].continuation)
    packed = PackedQuestions(*torch.tensor(places).T.contiguous())
    return TokenSequence(torch.tensor(tokens), packed, requests[predictions[0].request].task), predictions


def one_per_sequence(requests: Sequence[Request]) -> tuple[list[TokenSequence], list[list[Prediction]]]:
    """Return a sequence for each distinct input, for models that run one question at a time, and its predictions."""
    predictions: dict[tuple[str, Tokens], list[Prediction]] = {}  # by task and input
    for index, request in enumerate(requests):
        tokens = request.context + request.continuation[:-1]
        places = range(len(request.context) - 1, len(tokens))
        predictions.setdefault((request.task, tokens), []).extend(predictions_of(index, places, request.continuation))
    sequences = [TokenSequence(torch.tensor(tokens), task=task) for task, tokens in predictions]
    return sequences, list(predictions.values())


def predictions_of(request: int, positions: Iterable[int], targets: Iterable[int]) -> list[Prediction]:
    """Return the predictions of a request's tokens, each from the position before it."""
    return [Prediction(position, request, target) for position, target in zip(positions, targets, strict=True)]


def loglikelihoods(
    runner: ModelRunner, requests: Sequence[Request], *, length: int, progress: ShowProgress
) -> list[tuple[float, bool]]:
    """Return each continuation's log-likelihood in nats, and whether greedy decoding gives the continuation.

    `length` is the model's number of positions. The requests of a task are neighbours, so that their results do not
    depend on other tasks.
    """
    shortened = []
    for request in requests:  # the last tokens count, as in lm-eval; the last one of all is no input
        context = (request.context + request.continuation)[-(length + 1) : -len(request.continuation)]
        if not context:
            problem = f"a choice has no token, or more than the model's {length}"
            raise UserError(f"tasks.names: {request.task}: {problem}; remove it")
        shortened.append(request._replace(context=context))
    if runner.decoder.packs_questions:
        sequences, predictions = pack_questions(shortened, limit=SEQUENCE_TOKENS)
    else:
        sequences, predictions = one_per_sequence(shortened)
    for step in progress(runner.forward(sequences)):
        step.run()

    totals, is_greedy = [0.0] * len(requests), [True] * len(requests)
    answers = runner.map_outputs(predict, lambda places: predictions[places.start : places.stop])
    for index, log_p, is_likeliest in answers:
        totals[index] += log_p
        is_greedy[index] &= is_likeliest
    return list(zip(totals, is_greedy, strict=True))


def predict(
    decoder: Decoder, _sequences: Sequence[TokenSequence], hidden: Hidden, predictions: list[list[Prediction]]
) -> Iterator[tuple[int, float, bool]]:
    """Yield each prediction's request, its target's log-probability, and whether the target is the likeliest token."""
    by_position: dict[tuple[int, int], list[Prediction]] = {}  # by sequence and position
    for number, predictions_of_sequence in enumerate(predictions):
        for prediction in predictions_of_sequence:
            by_position.setdefault((number, prediction.position), []).append(prediction)
    positions = sorted(by_position)
    by_sequence = groupby(positions, key=itemgetter(0))
    states = torch.cat([hidden[number][[position for _, position in places]] for number, places in by_sequence])
    tokens = torch.zeros(len(positions), dtype=torch.long)  # not read: the head takes states
    for selected, logits in decoder.logits(states[None], tokens):
        log_p = logits.float().log_softmax(dim=-1)
        likeliest = log_p.argmax(dim=-1).tolist()
        rows: list[int] = []  # of the logits, by prediction
        predicted: list[Prediction] = []
        for row, position in enumerate(positions[selected]):
            rows += [row] * len(by_position[position])
            predicted += by_position[position]
        values = log_p[rows, [prediction.target for prediction in predicted]].tolist()
        for row, prediction, value in zip(rows, predicted, values, strict=True):
            yield prediction.request, value, likeliest[row] == prediction.target
