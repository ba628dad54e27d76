import pytest

from sae_emotion_plugin.tables import html_table, text_table


def test_columns_are_as_wide_as_their_widest_cell_and_lines_end_without_blanks() -> None:
    shown = text_table(("name", "n"), [("a", "100"), ("longer", "")])
    assert shown.split("\n") == ["name    n", "a       100", "longer"]


def test_a_table_without_lines_is_its_head() -> None:
    assert text_table(("name", "n"), []) == "name  n"
    assert "<tr><th>name</th></tr></table>" in html_table("", ("name",), [])


def test_everything_is_escaped_in_html() -> None:
    assert html_table("a < b", ("x & y",), [("<script>",)]) == (
        "<table><caption>a &lt; b</caption><tr><th>x &amp; y</th></tr><tr><td>&lt;script&gt;</td></tr></table>"
    )


@pytest.mark.parametrize("line", [("a",), ("a", "b", "c")])
def test_a_line_of_another_length_is_refused(line: tuple[str, ...]) -> None:
    with pytest.raises(ValueError):
        text_table(("name", "n"), [line])
