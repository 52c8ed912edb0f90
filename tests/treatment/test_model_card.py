# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""What a model card shows of texts that others wrote: the text to the letter, and nothing of it takes effect.

Cards are read as the Hub reads them: metadata by `huggingface_hub` and by a YAML parser, the page by a Markdown renderer that
lets raw HTML pass.
"""

import ast
import re

import pytest
import yaml
from fixtures.trainer import rows, tiny_detector, tiny_trainer
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt


PAGE = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
PROMPTS = [
    "<script>alert(1)</script> a hand",
    '<img src=x onerror="alert(1)">',
    "![x](http://example.com/x.png) [y](javascript:alert(1))",
    "a | b\n---\n# heading\n```\nfence\n```\n",
    "---\nbase_model: else\n---",
    "{{ 7 * 7 }} {% for x in y %} {# comment #} \"quotes\" 'single' \\n",
    "| a | b |\u2028|---|---|\x85 | c",
    "`code` **bold** _it_ <!-- comment",
]
# All that a card has without them.
KINDS = {
    "heading_open", "heading_close", "paragraph_open", "paragraph_close", "fence", "text", "softbreak", "code_inline", "image",
    "link_open", "link_close", "table_open", "table_close", "thead_open", "thead_close", "tbody_open", "tbody_close", "tr_open",
    "tr_close", "th_open", "th_close", "td_open", "td_close",
}  # fmt: skip


def elements(tokens):
    for token in tokens:
        yield from [token] if token.type != "inline" else elements(token.children)


def check_page(text: str) -> list:
    """The tokens of a card's page, of which all are the card's own."""
    tokens = PAGE.parse(text)
    found = list(elements(tokens))
    assert {token.type for token in found} <= KINDS
    for token in found:
        if token.type == "link_open":
            assert token.attrs["href"] == "https://huggingface.co/papers/2501.12382"
        if token.type == "image":
            assert re.fullmatch(r"images/(before|after)_\d\.png|report\.png", token.attrs["src"])
    assert [token.content for token in tokens if token.type == "inline"].count("Use") == 1
    return tokens


def texts(tokens) -> list[str]:
    """What a reader sees of each paragraph, heading and cell."""
    return ["".join(x.content for x in token.children) for token in tokens if token.type == "inline"]


@pytest.fixture(scope="module")
def card(tmp_path_factory):
    """The card of a treatment whose prompts, names and titles are all of them hostile."""
    folder = tmp_path_factory.mktemp("card") / "a`<b>|_[x](y)"
    parts = {"eval_dataset": {"<i>|x|": rows(PROMPTS)}, "train_dataset": rows(PROMPTS)}
    trainer = tiny_trainer(
        folder, parts=parts, eval_strategy="steps", eval_steps=1, max_steps=1, eval_num_images=8, log_images=8
    )
    trainer.train()
    trainer.create_model_card(tags=["<b>|tag"], dataset=["some/data"])
    return trainer, (folder / "README.md").read_bytes().decode("utf-8")


def test_prompts_arrive_to_the_letter_in_the_metadata(card):
    _, text = card
    assert [entry["text"] for entry in ModelCard(text).data.widget] == PROMPTS
    block = re.match(r"---\r?\n(.*?)\r?\n---", text, re.S)[1]
    metadata = yaml.safe_load(block)
    assert [entry["text"] for entry in metadata["widget"]] == PROMPTS
    assert metadata["tags"][-1] == "<b>|tag" and metadata["datasets"] == ["some/data"]
    assert "base_model" not in metadata  # of the prompt that looks like the end of the metadata


def test_prompts_are_text_on_the_page(card):
    _, text = card
    tokens = check_page(ModelCard(text).text)
    seen = texts(tokens)
    assert seen[0] == "a`<b>|_[x](y)"
    for prompt in PROMPTS:
        assert " ".join(prompt.split()) in seen
    assert any("<i>|x| artifact frequency" == x for x in seen)


def test_every_row_has_the_cells_of_its_head(card):
    tokens = PAGE.parse(ModelCard(card[1]).text)
    counts, head = [], None
    for token in tokens:
        if token.type == "tr_open":
            counts.append(0)
        counts[-1:] = [counts[-1] + 1] if token.type in ("th_open", "td_open") else counts[-1:]
        if token.type == "thead_open":
            head = len(counts)
        if token.type == "table_close":
            assert len(set(counts[head:])) == 1
    # the renderer drops surplus cells, so the source is looked at too
    for line in ModelCard(card[1]).text.splitlines():
        if line.startswith("| !") or line.endswith(".png) |"):
            assert line.count("|") == 4


def test_the_prompt_of_the_code_is_the_prompt(card):
    (code,) = (token.content for token in PAGE.parse(ModelCard(card[1]).text) if token.info == "python")
    call = ast.parse(code).body[-1].value.value.value  # image = pipe(...).images[0]
    assert call.args[0].value == PROMPTS[0]


def test_a_title_and_a_base_are_text_too(card, tmp_path):
    trainer, _ = card
    trainer.base["pipeline"], before = "models/<b>|`x`", trainer.base["pipeline"]
    trainer.create_model_card(model_name="# <u>title</u>\n---\n", output_dir=tmp_path)
    trainer.base["pipeline"] = before
    tokens = check_page(ModelCard.load(tmp_path / "README.md").text)
    assert texts(tokens)[0] == "# <u>title</u> ---"
    assert "models/<b>|`x` draw fewer artifacts" in texts(tokens)[1]


def test_a_rewards_name_is_text_too(tmp_path):
    parts = {"reward_funcs": lambda images, prompts: images.mean(dim=(1, 2, 3)), "regularization_dataset": None}
    trainer = tiny_trainer(tmp_path / "out", parts=parts, max_steps=1)
    trainer.train()
    trainer.create_model_card()
    assert "1 x <lambda>" in texts(check_page(ModelCard.load(tmp_path / "out/README.md").text))


@pytest.mark.parametrize(
    "name", ['a"b', "a\\b", "a{x}b", "a`b", "```", "a\nb", "<b>", "手", "user/detector", "\udcff"]
)
def test_the_card_of_a_detector_calls_it_by_its_name(name):
    text = tiny_detector().model_card(name)
    text.encode("utf-8")
    tokens = PAGE.parse(ModelCard(text).text)
    codes = [token.content for token in tokens if token.info == "python"]
    literals = [node.value for code in codes for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)]
    assert len(codes) == 2 and literals.count(name) == 2
    shown = [token for token in elements(tokens) if not re.fullmatch(r"<!-- .* [0-9a-f]+ -->\n?", token.content)]
    assert not {token.type for token in shown} & {"html_block", "html_inline", "image"}
    assert name == "user/detector" or all(name not in text for text in texts(tokens))
