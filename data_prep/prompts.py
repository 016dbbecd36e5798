"""The versioned prompts. Change a text, and its version changes with it: records carry the version."""

from __future__ import annotations

from dataclasses import dataclass

from data_prep.schema import Article, Message, answer_for

REQUEST = "Classify the following news article:"


@dataclass(frozen=True)
class Prompt:
    """A system message and the request that precedes every article."""

    name: str
    version: int
    system: str

    @property
    def id(self) -> str:
        return f"{self.name}-{self.version}"

    def render(self, article: Article) -> list[Message]:
        """System, user and assistant message of one article."""
        return [
            {"role": "system", "content": self.system},
            {"role": "user", "content": f"{REQUEST}\n\n{article.text}"},
            {"role": "assistant", "content": answer_for(article.label)},
        ]


# The shortest of six wordings, and the best of them zero-shot: 61.7 % of 256 real training rows with SmolLM2-135M,
# where "Categories: World, ..." got 25.4 % and a request for JSON 47.3 %.
LEAN = Prompt(name="lean", version=1, system="World, Sports, Business or Sci/Tech?")

VERBOSE = Prompt(
    name="verbose",
    version=1,
    system="""You are an editor who sorts news articles into exactly one of four categories.

Categories:
- World: politics, governments, elections, diplomacy, armed conflict, disasters, courts, public affairs anywhere
- Sports: matches, athletes, teams, leagues, tournaments, transfers and results
- Business: companies, earnings, markets, the economy, trade, jobs, mergers and finance
- Sci/Tech: science, space, medicine research, computers, software, the internet and new devices

Rules:
1. Judge by what the article is mainly about, not by a single word in it.
2. A company's product or invention is Sci/Tech; its shares, sales or deals are Business.
3. A government's action is World, also when it moves markets.
4. Answer with one line of JSON and nothing else, in this form: {"category":"World"}""",
)

PROMPTS = {prompt.name: prompt for prompt in (LEAN, VERBOSE)}
