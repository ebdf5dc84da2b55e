"""Requests of every kind, and what each is answered alone."""

import random
from itertools import product

from tiny import tiny_picture, tiny_video

from ep_export.policy import Keep
from ep_export.runtime import Sampling
from ep_export.serving import Request

__all__ = ["alone", "random_requests"]


def alone(session, request):
    """The same request by `Session.generate`."""
    return session.generate(
        request.visuals,
        request.question,
        max_new_tokens=request.max_new_tokens,
        keep=request.keep,
        policies=request.policies,
        prune=request.prune,
        sampling=request.sampling,
    )


def random_requests(count, *, seed, policies, keeps, questions, sides, videos=False):
    """Requests that differ in pictures, keep, policy, sampling and length.

    Args:
        count: How many.
        seed: Of the draw.
        policies: Tuples of policies.
        keeps: Of the amount.
        questions: Texts.
        sides: (smallest, largest) side of a picture in pixels.
        videos: Whether some of the pictures are videos.
    """
    draw = random.Random(seed)  # noqa: S311 - no secret
    prunings = [*product(policies, keeps, [True]), ((), None, False)]
    samplings = [None, None, Sampling(temperature=1.5, seed=1), Sampling(top_p=0.9, top_k=20, seed=2)]
    requests = []
    for number in range(count):
        names, keep, prune = draw.choice(prunings)
        visuals = [
            tiny_picture(draw.randint(*sides), draw.randint(*sides), seed=10 * number + i)
            for i in range(draw.choice([0, 1, 1, 1, 2]))
        ]
        if videos and draw.random() < 0.3:
            visuals.append(tiny_video(70, 50, draw.randint(1, 4), seed=number))
        requests.append(
            Request(
                question=draw.choice(questions),
                visuals=tuple(visuals),
                keep=keep if keep is None or isinstance(keep, Keep) else Keep(ratio=keep),
                policies=names,
                prune=prune,
                sampling=draw.choice(samplings),
                max_new_tokens=draw.randint(1, 8),
            )
        )
    return requests
