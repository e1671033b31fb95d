"""Exam: how well towers in training read pages that they have not learned from."""

import torch

LONGEST = 40  # tokens of an answer
TEXT_SHARES = (0.12, 0.6, 0.18, 0.1, 0.0)  # of layout.KINDS


def distance(first: list[int], second: list[int]) -> int:
    """Insertions, deletions and changes that make one list the other."""
    before = list(range(len(second) + 1))
    for row, left in enumerate(first, 1):
        now = [row]
        for column, right in enumerate(second, 1):
            now.append(min(now[-1] + 1, before[column] + 1, before[column - 1] + (left != right)))
        before = now
    return before[-1]


def examine(course, studio) -> dict[str, float]:
    """What the heads get right, and from the read stage on how well words are read behind the oldest projector."""
    studio.dice.generator.manual_seed(10_000)
    batch = studio.draw_pages(course.settings.exam_pages, TEXT_SHARES)
    with course.autocast():
        return answer(course, batch)


def answer(course, batch) -> dict[str, float]:
    """The figures of one batch."""
    modules, found = course.modules, {}
    if course.stage == "language":
        embeddings = modules["language"].embeddings
        letters = embeddings[course.teacher.tokens.clamp(min=0)]
        patches = modules["spelled"](letters, batch.slots, batch.places, batch.placed)
        return read(course, patches, batch)
    features = modules["vision"](batch.images)
    losses = modules["reader"].losses(features, batch.slots, batch.places, batch.placed)
    found = {name: float(losses[name]) for name in ("accuracy", "missed", "counted", "mood") if name in losses}
    if course.stage in ("read", "joint"):
        oldest = max(range(len(course.pool.ages)), key=lambda number: course.pool.ages[number])
        first, first_bias, second, second_bias = (weight[oldest] for weight in course.pool.weights)
        hidden = torch.nn.functional.gelu((features * course.scale) @ first.T + first_bias)
        found |= read(course, hidden @ second.T + second_bias, batch)
        found["age"] = course.pool.ages[oldest]
    return found


def read(course, patches: torch.Tensor, batch) -> dict[str, float]:
    """Greedy answers to the first question for the text: errors a letter, and pages without text told so."""
    teacher, language = course.teacher, course.modules["language"]
    embeddings = language.embeddings.to(patches.dtype)
    question = teacher.own["text"][0]
    question = question[question >= 0]
    count = len(patches)
    head = torch.cat(
        [embeddings[teacher.prefix].expand(count, -1, -1), patches, embeddings[question].expand(count, -1, -1)], 1
    )
    answers = torch.empty(count, 0, dtype=torch.long, device=patches.device)
    done = torch.zeros(count, dtype=torch.bool, device=patches.device)
    for _ in range(LONGEST):
        states = torch.cat([head, embeddings[answers]], dim=1)
        token = (language(states)[:, -1] @ embeddings.T).argmax(-1)
        token = torch.where(done, teacher.end, token)
        answers, done = torch.cat([answers, token[:, None]], dim=1), done | (token == teacher.end)
        if bool(done.all()):
            break
    truths, no_text = teacher.spell(batch.text).tolist(), teacher.no_text.tolist()
    errors = letters = silent = told = stopped = 0
    for answer, truth in zip(answers.tolist(), truths, strict=True):
        stopped += teacher.end in answer
        answer = answer[: answer.index(teacher.end)] if teacher.end in answer else answer
        truth = [token for token in truth if token >= 0]
        if truth == no_text:
            silent, told = silent + 1, told + (answer == no_text)
        elif len(truth) < LONGEST:
            errors, letters = errors + distance(answer, truth), letters + len(truth)
    return {"error rate": errors / max(letters, 1), "told": told / max(silent, 1), "stopped": stopped / count}
