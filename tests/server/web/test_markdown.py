"""What a model writes, on the page: Markdown, code in colours, formulas; and never anything that acts."""

from __future__ import annotations

import pytest
from playwright.sync_api import Page

from tests.server.web.pages import needs_chromium


def shown(page: Page, markdown: str) -> str:
    """The HTML that the page's renderer makes of a text."""
    script = """async (text) => {
        const { render } = await import("/web/markdown.js");
        const box = document.createElement("div");
        render(box, text);
        return box.innerHTML;
    }"""
    return str(page.evaluate(script, markdown))


def shown_with_formulas(page: Page, markdown: str) -> str:
    """The same, once what translates formulas has been fetched."""
    fetch = """async () => {
        const { formula } = await import("/web/formula.js");
        for (let i = 0; i < 300 && !formula("x", false).querySelector("math"); i += 1) {
            await new Promise((resolve) => setTimeout(resolve, 100));
        }
    }"""
    page.evaluate(fetch)
    return shown(page, markdown)


@pytest.mark.slow
@needs_chromium
@pytest.mark.parametrize(
    ("text", "html"),
    [
        ("# One\n\ntwo **three**", "<h3>One</h3><p>two <strong>three</strong></p>"),
        ("*four* `five`", "<p><em>four</em> <code>five</code></p>"),
        ("snake_case_name and 2*3*4 = 24", "<p>snake_case_name and 2<em>3</em>4 = 24</p>"),
        ("- a\n- b\n  - c", "<ul><li>a</li><li>b<ul><li>c</li></ul></li></ul>"),
        ("3. c\n4. d", '<ol start="3"><li>c</li><li>d</li></ol>'),
        ("> a\n> b", "<blockquote><p>a<br>b</p></blockquote>"),
        ("**open `code", "<p>**open `code</p>"),
        ("***both***", "<p><strong><em>both</em></strong></p>"),
        ("a\n\n---\n\nb", "<p>a</p><hr><p>b</p>"),
        ("~~gone~~ \\*kept\\*", "<p><del>gone</del> *kept*</p>"),
        ("\\(x", "<p>\\(x</p>"),
        ("between $5 and $10, or $3-$4", "<p>between $5 and $10, or $3-$4</p>"),
    ],
)
def test_markdown_becomes_elements(renderer: Page, text: str, html: str) -> None:
    assert shown(renderer, text) == html


@pytest.mark.slow
@needs_chromium
def test_tables_and_code_become_elements(renderer: Page) -> None:
    table = shown(renderer, "| a | b |\n|---|--:|\n| 1 | `x` |")
    code = shown(renderer, "```python\nif a < b:\n    pass")

    assert '<th class="left" scope="col">a</th><th class="right" scope="col">b</th>' in table
    assert '<td class="right"><code>x</code></td>' in table
    assert "<code>if a &lt; b:\n    pass</code>" in code
    assert "<span>python</span>" in code


@pytest.mark.slow
@needs_chromium
@pytest.mark.parametrize(
    "text",
    [
        "<script>alert(1)</script>",
        "<img src=x onerror=alert(1)>",
        "[a](javascript:alert(1))",
        "[a](data:text/html,x)",
        "![a](x.png)",
        "[a](  JAVASCRIPT:alert(1))",
        "```<img src=x onerror=alert(1)>\n</code></pre><script>1</script>\n```",
        '[a](https://x.example/"onmouseover="alert(1))',
    ],
)
def test_nothing_in_a_text_becomes_a_script_or_is_loaded(renderer: Page, text: str) -> None:
    html = shown(renderer, text)

    assert "<script" not in html
    assert "<img" not in html
    assert 'href="' not in html or 'href="https://' in html
    assert '"onmouseover=' not in html


@pytest.mark.slow
@needs_chromium
@pytest.mark.parametrize(
    "piece",
    ["*a ", "**a", "`", "[", "> ", "_~*", "- ", "|a", "[a](", "h", "https://", "$a ", "\\(", "\\[\n", "$$\n"],
)
def test_long_runs_of_marks_do_not_hold_the_page(renderer: Page, piece: str) -> None:
    renderer.set_default_timeout(20_000)
    assert "a" in shown(renderer, piece * 3000 + "a")


@pytest.mark.slow
@needs_chromium
@pytest.mark.parametrize(
    ("text", "display"),
    [
        ("so \\(\\frac{1}{2}\\) it is", False),
        ("so $\\frac{1}{2}$ it is", False),
        ("\\[\n\\frac{1}{2}\n\\]\nthen", True),
        ("first\n$$\\frac{1}{2}$$", True),
        ("- in a list $$\\frac{1}{2}$$", True),
    ],
)
def test_formulas_become_mathml(renderer: Page, text: str, display: bool) -> None:
    html = shown_with_formulas(renderer, text)

    assert "<mfrac><mn>1</mn><mn>2</mn></mfrac>" in html
    assert ('display="block"' in html) == display
    assert "\\" not in html


@pytest.mark.slow
@needs_chromium
@pytest.mark.parametrize(
    "tex",
    [
        "\\href{javascript:alert(1)}{x}",
        "\\class{a}{x}",
        "\\frac{1",
        "\\def\\a{\\a\\a}\\a",
        "\\pmb{x}",
        "\\text{<img src=x onerror=alert(1)>}",
        "\\color{red;x:url(//e.example)}x",
    ],
)
def test_no_formula_acts_or_breaks_the_policy(renderer: Page, tex: str) -> None:
    html = shown_with_formulas(renderer, f"\\({tex}\\)")

    assert "formula" in html
    for harm in ("<img", "href", 'class="a"', "url("):
        assert harm not in html.replace(tex, "")


@pytest.mark.slow
@needs_chromium
def test_code_is_coloured_when_its_block_is_whole(renderer: Page) -> None:
    script = """async () => {
        const { render } = await import("/web/markdown.js");
        const { highlight } = await import("/web/highlight.js");
        const [growing, whole] = [document.createElement("div"), document.createElement("div")];
        render(growing, "```py\\nif x == '<b>':");
        render(whole, "```Python\\nif x == '<b>':\\n```");
        const place = document.createElement("code");
        await highlight(place, "const x = 1;", "js"); // by then the other has been fetched too
        await new Promise((resolve) => setTimeout(resolve, 300));
        return [growing, whole].map((each) => each.querySelector("code").innerHTML).concat(place.innerHTML);
    }"""
    growing, whole, js = renderer.evaluate(script)
    assert growing == "if x == '&lt;b&gt;':"
    coloured = '<span class="hljs-keyword">if</span> x == <span class="hljs-string">\'&lt;b&gt;\'</span>:'
    assert whole == coloured
    assert '<span class="hljs-number">1</span>' in js
