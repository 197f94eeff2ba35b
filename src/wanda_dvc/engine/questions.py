"""Log-likelihoods of continuations: a context runs once for all its continuations; a row has many questions."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter

import torch

from wanda_dvc.engine.decoder import LOGITS_AT_A_TIME, Decoder
from wanda_dvc.engine.forward import BlockStep, ModelRunner
from wanda_dvc.engine.sequences import Hidden, PackedQuestions, TokenSequence
from wanda_dvc.errors import UserError

ROW = 2048  # tokens: large multiplications, small activations

ShowProgress = Callable[[Iterator[BlockStep]], Iterable[BlockStep]]
Prediction = tuple[int, int, int]  # token of a row, request, target
Place = tuple[int, list[int]]  # of a request: its row, and the positions in the row that predict its continuation


@dataclass(frozen=True)
class Request:
    """A request for the log-likelihood of a continuation after a context. Token ids, at least one each."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]

    def within(self, length: int) -> "Request":
        """Return the request with its last `length` input tokens, as in lm-eval. The last token is no input."""
        tokens = (self.context + self.continuation)[-(length + 1) :]
        return Request(tokens[: -len(self.continuation)], self.continuation)


def pack(requests: Sequence[Request], *, tokens: int) -> tuple[list[TokenSequence], list[Place]]:
    """Return rows of complete questions, and the place of every request in the rows.

    A question is the requests of one context: the context, then each continuation without its last token. A row has as
    many questions as fit into `tokens`. The items of a task without contexts, such as XNLI, share one context. They are
    several questions of about `ROW` tokens, because attention takes the square of a question.
    """
    questions: dict[tuple[tuple[int, ...], int], dict[tuple[int, ...], list[int]]] = {}
    taken = Counter[tuple[int, ...]]()  # tokens of the choices so far, by context
    for index, request in enumerate(requests):
        # The last token of a continuation is predicted, not an input. So choices of one token add nothing to the row.
        key, part = (request.context, taken[request.context] // ROW), request.continuation[:-1]
        questions.setdefault(key, {}).setdefault(part, []).append(index)
        taken[request.context] += len(part)
    rows: list[TokenSequence] = []
    places: dict[int, Place] = {}
    row: list[tuple[int, int, int, int]] = []  # token, position, question and choice

    def end_row() -> None:
        fed, *layout = map(torch.tensor, zip(*row, strict=True))  # tensors of their own memory
        rows.append(TokenSequence(fed, PackedQuestions(*layout)))
        row.clear()

    for number, ((context, _), choices) in enumerate(questions.items()):
        if row and len(row) + len(context) + sum(map(len, choices)) > tokens:
            end_row()
        last = len(row) + len(context) - 1
        for place, (part, asked) in enumerate([(context, []), *choices.items()]):
            start, behind = len(row), 0 if place == 0 else len(context)
            row += [(token, behind + at, number, place) for at, token in enumerate(part)]
            for index in asked:
                places[index] = len(rows), [last, *range(start, len(row))]
    if row:
        end_row()
    return rows, [places[index] for index in range(len(requests))]


def one_per_sequence(requests: Sequence[Request]) -> tuple[list[TokenSequence], list[Place]]:
    """Return a row for each distinct sequence, for models without support for several questions in a row."""
    numbers: dict[tuple[int, ...], int] = {}
    places: list[Place] = []
    for request in requests:
        fed = request.context + request.continuation[:-1]
        places.append((numbers.setdefault(fed, len(numbers)), list(range(len(request.context) - 1, len(fed)))))
    return [TokenSequence(torch.tensor(fed)) for fed in numbers], places


def loglikelihoods(
    runner: ModelRunner, requests: Sequence[Request], *, length: int, progress: ShowProgress, task: str = "a task"
) -> list[tuple[float, bool]]:
    """Return each continuation's log-likelihood in nats, and whether greedy decoding gives the continuation.

    `length` is the model's number of positions. An interrupted run resumes from the runner's files.
    """
    requests = [request.within(length) for request in requests]
    if not all(request.context for request in requests):
        raise UserError(f"tasks.names: {task}: a choice has no token, or more than the model's {length}; remove it")
    rows, places = pack(requests, tokens=ROW) if runner.decoder.packs_questions else one_per_sequence(requests)
    for step in progress(runner.forward(rows)):
        step.run()
    of_row: list[list[Prediction]] = [[] for _ in rows]
    for index, ((row, tokens), request) in enumerate(zip(places, requests, strict=True)):
        for token, target in zip(tokens, request.continuation, strict=True):
            of_row[row].append((token, index, target))

    totals, greedy = [0.0] * len(requests), [True] * len(requests)
    for index, value, likeliest in runner.head(predict, lambda shard: (length, of_row[shard.start : shard.stop])):
        totals[index] += value
        greedy[index] &= likeliest
    return list(zip(totals, greedy, strict=True))


def predict(
    decoder: Decoder, _rows: Sequence[TokenSequence], hidden: Hidden, asked: tuple[int, list[list[Prediction]]]
) -> Iterator[tuple[int, float, bool]]:
    """Yield each prediction's request, its target's log-probability, and whether the target is the likeliest token.

    `asked` holds the model's number of positions and the predictions of each row.
    """
    length, of_row = asked
    predicted = sorted((row, *one) for row, every in enumerate(of_row) for one in every)
    tokens = [list(group) for _, group in groupby(predicted, key=itemgetter(0, 1))]
    # A chunk has at most the model's number of positions: some models look positions up even in the head.
    chunk = max(1, min(LOGITS_AT_A_TIME // decoder.vocabulary, length))
    for start in range(0, len(tokens), chunk):
        part = tokens[start : start + chunk]
        states = torch.stack([hidden[group[0][0]][group[0][1]].to(decoder.device) for group in part])[None]
        ((_, logits),) = decoder.logits(states, torch.zeros(len(part), dtype=torch.long, device=decoder.device))
        logprobs = logits.float().log_softmax(dim=-1)
        likeliest = logprobs.argmax(dim=-1).tolist()
        found = [(at, index, target) for at, group in enumerate(part) for _, _, index, target in group]
        values = logprobs[[at for at, _, _ in found], [target for _, _, target in found]].tolist()
        for (at, index, target), value in zip(found, values, strict=True):
            yield index, value, likeliest[at] == target
