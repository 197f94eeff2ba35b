"""Log-likelihoods of continuations through the engine: a context once for all that follow it, many to a row."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import torch

from wanda_dvc.engine.attention import Layout
from wanda_dvc.engine.decoder import LOGITS_AT_A_TIME, Decoder, Row, Step

ROW = 2048  # tokens; enough to keep a machine's multiplications large, and a row's activations small

Progress = Callable[[Iterable[Step], int], Iterable[Step]]


@dataclass(frozen=True)
class Request:
    """What is asked: how likely is the continuation after the context? Token ids, at least one each."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]

    def within(self, length: int) -> "Request":
        """Cut from the left, as lm-eval does, to what a model of so many positions sees; the last token isn't fed."""
        tokens = (self.context + self.continuation)[-(length + 1) :]
        return Request(tokens[: -len(self.continuation)], self.continuation)


@dataclass(frozen=True)
class Place:
    """Where in its row each token of a request's continuation is predicted."""

    row: int
    tokens: list[int]


def pack(requests: Sequence[Request], *, tokens: int = ROW) -> tuple[list[Row], list[Place]]:
    """Rows of whole questions, each its context and behind it what differs, and every request's place.

    A question is all requests of one context. A row ends before the question that would make it longer than `tokens`.
    """
    questions: dict[tuple[int, ...], dict[tuple[int, ...], list[int]]] = {}
    for index, request in enumerate(requests):
        # The last token of a continuation is predicted and not fed: choices of one token share their context's end.
        questions.setdefault(request.context, {}).setdefault(request.continuation[:-1], []).append(index)
    rows: list[Row] = []
    places: dict[int, Place] = {}
    fed: list[int] = []
    positions: list[int] = []
    question: list[int] = []
    choice: list[int] = []

    def end_row() -> None:
        layout = Layout(*(torch.tensor(values) for values in (positions, question, choice)))
        rows.append(Row(torch.tensor(fed), layout))
        for values in (fed, positions, question, choice):
            values.clear()

    for number, (context, choices) in enumerate(questions.items()):
        if fed and len(fed) + len(context) + sum(map(len, choices)) > tokens:
            end_row()
        last = len(fed) + len(context) - 1
        for place, (part, asked) in enumerate([(context, []), *choices.items()]):
            start, behind = len(fed), 0 if place == 0 else len(context)
            fed += part
            positions += range(behind, behind + len(part))
            question += [number] * len(part)
            choice += [place] * len(part)
            for index in asked:
                places[index] = Place(len(rows), [last, *range(start, len(fed))])
    if fed:
        end_row()
    return rows, [places[index] for index in range(len(requests))]


def spread(requests: Sequence[Request]) -> tuple[list[Row], list[Place]]:
    """A row for each distinct sequence that is fed, for models that can't hold several in one."""
    numbers: dict[tuple[int, ...], int] = {}
    places = []
    for request in requests:
        fed = request.context + request.continuation[:-1]
        places.append(Place(numbers.setdefault(fed, len(numbers)), list(range(len(request.context) - 1, len(fed)))))
    return [Row(torch.tensor(fed)) for fed in numbers], places


def loglikelihoods(
    decoder: Decoder, requests: Sequence[Request], work: Path, *, length: int, progress: Progress
) -> list[tuple[float, bool]]:
    """Each continuation's log-likelihood in nats, and whether every token of it is the likeliest.

    `length`: the positions that the model has. What a killed run has in `work` is gone on from.
    """
    requests = [request.within(length) for request in requests]
    rows, places = pack(requests) if decoder.holds_layouts else spread(requests)
    for step in progress(decoder.walk(rows, work), len(decoder.blocks)):
        step.advance()
    hidden = decoder.outputs(rows, work)
    # Every prediction as (row, token, request, target), and those of one token together.
    predicted = sorted(
        (place.row, token, index, target)
        for index, (place, request) in enumerate(zip(places, requests, strict=True))
        for token, target in zip(place.tokens, request.continuation, strict=True)
    )
    tokens = [list(group) for _, group in groupby(predicted, key=itemgetter(0, 1))]
    totals, greedy = [0.0] * len(requests), [True] * len(requests)
    # One chunk of logits at a time, and no more than the model has positions: some look those up even here.
    chunk = max(1, min(LOGITS_AT_A_TIME // decoder.model.get_output_embeddings().weight.shape[0], length))
    for start in range(0, len(tokens), chunk):
        part = tokens[start : start + chunk]
        states = torch.stack([hidden[group[0][0]][group[0][1]] for group in part])[None]
        ((_, logits),) = decoder.logits(states, torch.zeros(len(part), dtype=torch.long))
        logprobs = logits.float().log_softmax(dim=-1)
        likeliest = logprobs.argmax(dim=-1).tolist()
        asked = [(at, index, target) for at, group in enumerate(part) for _, _, index, target in group]
        values = logprobs[[at for at, _, _ in asked], [target for _, _, target in asked]].tolist()
        for (at, index, target), value in zip(asked, values, strict=True):
            totals[index] += value
            greedy[index] &= likeliest[at] == target
    return list(zip(totals, greedy, strict=True))
