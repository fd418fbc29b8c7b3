"""A world small enough to be solved: two prompts, fifteen responses of one to three tokens, a softmax policy per state.

A response is written token by token, A, B or END, and is cut after three. So credit has to reach early tokens, lengths
differ, and the policy that is best can be computed: by closed form over whole responses, or backwards over states.
Everything is float64.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any

import scipy
import torch
from torch import Tensor

from rlhf_lab.records import Prompt
from rlhf_lab.types import Experience, Metrics, PolicyForward, Rollout, Score, ScoredRollout, Sequences, Term

END, TOKENS = 2, 3
STREAMS = ("helpful", "humour", "cost")

Divergence = Callable[[Tensor, Tensor, float], Tensor]  # (..., N) reference, (..., N) reward, beta -> best policy


def written(longest: int) -> list[tuple[int, ...]]:
    """Every response of at most `longest` tokens: ended by END, or cut there."""
    ended = [(*text, END) for n in range(longest) for text in product(range(END), repeat=n)]
    return ended + list(product(range(END), repeat=longest))


@dataclass(frozen=True, kw_only=True)
class World:
    """P prompts, R responses, S states (what has been written so far), N tokens.

    Fields:
        reference: (P, S, N) logits.
        scores: stream -> (P, R).
        prompts: what each of the P prompts is, conditions and weights included.
    """

    reference: Tensor
    scores: Mapping[str, Tensor]
    prompts: Sequence[Prompt]
    longest: int

    @classmethod
    def drawn(cls, longest: int = 3, prompts: Sequence[Prompt] | None = None, spread: float = 0.7) -> "World":
        """Scores and a reference without any pattern, always the same."""
        asked = prompts or [Prompt.from_text("left"), Prompt.from_text("right")]
        source = torch.Generator().manual_seed(5)
        states, responses = sum(END**n for n in range(longest)), len(written(longest))
        draw = {"dtype": torch.float64, "generator": source}
        return cls(
            reference=0.5 * torch.randn(len(asked), states, TOKENS, **draw),
            scores={stream: spread * torch.randn(len(asked), responses, **draw) for stream in STREAMS},
            prompts=asked,
            longest=longest,
        )

    @cached_property
    def responses(self) -> list[tuple[int, ...]]:
        return written(self.longest)

    @cached_property
    def states(self) -> dict[tuple[int, ...], int]:
        """What has been written -> its row of a policy's table; shorter texts first."""
        texts = [text for n in range(self.longest) for text in product(range(END), repeat=n)]
        return {text: row for row, text in enumerate(texts)}

    @cached_property
    def tokens(self) -> Tensor:
        """(R, T) int64, padded with 0."""
        return torch.tensor([[*text, *[0] * (self.longest - len(text))] for text in self.responses])

    @cached_property
    def mask(self) -> Tensor:
        """(R, T) bool."""
        return torch.tensor([[t < len(text) for t in range(self.longest)] for text in self.responses])

    @cached_property
    def visited(self) -> Tensor:
        """(R, T) int64: the state in which each token is written; 0 where masked."""
        rows = [[self.states[text[:t]] for t in range(len(text))] for text in self.responses]
        return torch.tensor([[*row, *[0] * (self.longest - len(row))] for row in rows])

    def token_logprobs(self, logits: Tensor) -> Tensor:
        """(P, S, N) logits -> (P, R, T) log-probabilities of each response's tokens; 0 where masked."""
        return logits.log_softmax(-1)[:, self.visited, self.tokens].where(self.mask, 0)

    def probabilities(self, logits: Tensor) -> Tensor:
        """(P, R): of each whole response."""
        return self.token_logprobs(logits).sum(-1).exp()

    @cached_property
    def prior(self) -> Tensor:
        """(P, R): of each response under the reference."""
        return self.probabilities(self.reference)

    def sample(
        self, logits: Tensor, rows: int, samples: int, values: Mapping[str, Tensor], source: torch.Generator
    ) -> tuple[ScoredRollout, Tensor, Tensor]:
        """Responses to each prompt, scored, in groups of `samples`.

        Systematic sampling: every response is drawn floor or ceil of rows times its probability often, without bias and
        with next to no noise; in an order without meaning, so that siblings are like any others.

        Args:
            rows: of each prompt; a multiple of `samples`.
            values: critic -> (P, S).

        Returns:
            The scored rollout, and (B,) each the prompt and the response of its rows.
        """
        logprobs, ref_logprobs = self.token_logprobs(logits.detach()), self.token_logprobs(self.reference)
        asked, said = [], []
        for prompt, chances in enumerate(logprobs.sum(-1).exp()):
            places = (torch.arange(rows) + torch.rand((), dtype=torch.float64, generator=source)) / rows
            drawn = torch.searchsorted(chances.cumsum(0), places).clamp(max=len(self.responses) - 1)
            said.append(drawn[torch.randperm(rows, generator=source)])
            asked.append(torch.full((rows,), prompt))
        which, row = torch.cat(asked), torch.cat(said)
        mask = self.mask[row]
        sequences = Sequences(
            tokens=torch.cat([torch.zeros(len(row), 1, dtype=torch.int64), self.tokens[row]], dim=1),
            attention_mask=torch.cat([torch.ones(len(row), 1, dtype=torch.bool), mask], dim=1),
            position_ids=torch.arange(self.longest + 1).expand(len(row), -1),
            response_mask=mask,
        )
        rollout = Rollout(
            prompts=[self.prompts[p] for p in which.tolist()],
            sequences=sequences,
            group=torch.arange(len(row)) // samples,
            finished=self.tokens[row, mask.sum(1) - 1] == END,
            responses=[str(self.responses[i]) for i in row.tolist()],
            logprobs=logprobs[which, row],
        )
        scores = {name: score[which, row] for name, score in self.scores.items()}
        scored = ScoredRollout(
            rollout=rollout,
            scores={name: Score(value=value, members=value[:, None]) for name, value in scores.items()},
            ref_logprobs=ref_logprobs[which, row],
            values={name: self._values(table.detach(), which, row) for name, table in values.items()},
        )
        return scored, which, row

    def _values(self, table: Tensor, which: Tensor, row: Tensor) -> Tensor:
        return table[which[:, None], self.visited[row]].where(self.mask[row], 0)

    def learn(
        self,
        algorithm: Any,  # an OnlineAlgorithm, whatever it declares as class attributes
        *,
        iterations: int = 160,
        rows: int = 256,
        samples: int = 256,
        lr: float = 0.1,
        minibatches: int = 1,
        epochs: int = 1,
    ) -> tuple[Tensor, Metrics]:
        """Train a policy that starts at the reference.

        The rates fall to zero linearly; what is returned is the average over the last quarter of the iterations.

        Returns:
            (P, R) probabilities, and every metric's average.
        """
        source = torch.Generator().manual_seed(0)
        logits = self.reference.clone().requires_grad_()
        shape = self.reference.shape[:2]
        values = {name: torch.zeros(shape, dtype=torch.float64, requires_grad=True) for name in algorithm.critics}
        optimiser = torch.optim.Adam([{"params": [logits], "lr": lr}, {"params": [*values.values()], "lr": 3 * lr}])
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda done: 1 - done / iterations)
        averaged, seen = torch.zeros_like(self.prior), 0
        means: Metrics = {}
        for iteration in range(iterations):
            scored, which, row = self.sample(logits, rows, samples, values, source)
            experience, metrics = algorithm.prepare(scored)
            for _ in range(epochs):
                for part in torch.randperm(len(row), generator=source).tensor_split(minibatches):
                    batch = experience.select(part)
                    new = PolicyForward(
                        logprobs=self.token_logprobs(logits)[which[part], row[part]],
                        entropy=torch.zeros(batch.token_mask.shape),
                        values={name: self._values(table, which[part], row[part]) for name, table in values.items()},
                    )
                    optimiser.zero_grad()
                    total(algorithm.loss(new, batch), batch).backward()
                    optimiser.step()
            schedule.step()
            if iteration >= iterations * 3 // 4:
                averaged += self.probabilities(logits.detach())
                seen += 1
                means = {name: means.get(name, 0.0) + value for name, value in metrics.items()}
        return averaged / seen, {name: value / seen for name, value in means.items()}

    def backwards(self, reward: Tensor, beta: float, best: Divergence) -> Tensor:
        """(P, R) of the policy whose every state is `best` for the reward expected after each token.

        That is where a penalty ends that sees one token at a time, as it does in the loss.

        Args:
            reward: (P, R).
        """
        prior = self.reference.softmax(-1)
        policy = prior.clone()
        worth = {text: reward[:, i] for i, text in enumerate(self.responses)}  # (P,) each
        for text in reversed(self.states):
            after = torch.stack([worth[(*text, token)] for token in range(TOKENS)], dim=-1)  # (P, N)
            row = self.states[text]
            policy[:, row] = best(prior[:, row], after, beta)
            worth[text] = (policy[:, row] * after).sum(-1)
        return self.probabilities(policy.log())


def total(terms: Sequence[Term], batch: Experience) -> Tensor:
    """The loss of one minibatch: tokens of a per-token term weigh the same, rows of a per-row term too."""
    means = [
        term.weight * (term.values[batch.token_mask].mean() if term.per == "token" else term.values.mean())
        for term in terms
        if term.weight
    ]
    return torch.stack(means).sum()


def forward_kl_optimum(prior: Tensor, reward: Tensor, beta: float) -> Tensor:
    """The maximiser of E[r] - beta KL(pi || ref) over the last dimension: ref exp(r / beta) / Z."""
    return (prior.log() + reward / beta).softmax(-1)


def reverse_kl_optimum(prior: Tensor, reward: Tensor, beta: float) -> Tensor:
    """The maximiser of E[r] - beta KL(ref || pi): beta ref / (nu - r), nu > max r such that it sums to 1."""

    def solve(p: Tensor, r: Tensor) -> Tensor:
        top = r.max().item()
        nu = scipy.optimize.brentq(lambda x: (beta * p / (x - r)).sum().item() - 1, top + 1e-9, top + beta + 1e-9)
        return beta * p / (nu - r)

    return _each(solve, prior, reward)


def chi2_optimum(prior: Tensor, reward: Tensor, beta: float) -> Tensor:
    """The maximiser of E[r] - beta (E_pi[pi / ref] - 1): ref (r - nu)_+ / (2 beta), nu such that it sums to 1."""

    def solve(p: Tensor, r: Tensor) -> Tensor:
        low, high = r.min().item() - 2 * beta - 1e-9, r.max().item()
        nu = scipy.optimize.brentq(lambda x: (p * (r - x).clamp(min=0)).sum().item() / (2 * beta) - 1, low, high)
        return p * (r - nu).clamp(min=0) / (2 * beta)

    return _each(solve, prior, reward)


def _each(solve: Callable[[Tensor, Tensor], Tensor], prior: Tensor, reward: Tensor) -> Tensor:
    return torch.stack([solve(p, r) for p, r in zip(prior, reward, strict=True)])


def distance(policy: Tensor, other: Tensor) -> float:
    """The largest total variation distance between two policies' responses to a prompt; (P, R) each."""
    return (policy - other).abs().sum(-1).max().item() / 2


def mean(policy: Tensor, score: Tensor) -> float:
    """E[score] over prompts and responses; (P, R) each."""
    return (policy * score).sum(-1).mean().item()
