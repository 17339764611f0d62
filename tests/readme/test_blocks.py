"""README's code blocks, and that the walk knows all of them."""

from __future__ import annotations

import pytest

from ikectx_cli.lab.boot import CHECKOUT
from tests.readme.blocks import Page, blocks
from tests.readme.walk import ELSEWHERE, swapped

TEXT = """\
# Top
```
one
```
## Steps
1. First:

   ```toml
   a = 1

   [b]
   ```
2. Second:
   ```
   # no heading
   ```
"""


def test_blocks_by_heading() -> None:
    found = blocks(TEXT)
    assert found == {"Top": ["one\n"], "Steps": ["a = 1\n\n[b]\n", "# no heading\n"]}
    page = Page(found)
    assert page.take("Steps", 1) == "# no heading\n"
    assert page.unused() == [("Steps", 0), ("Top", 0)]
    for heading, number in (("Steps", 2), ("None", 0)):
        with pytest.raises(LookupError, match="README has no block"):
            page.take(heading, number)


def test_readme_has_what_the_walk_leaves_out() -> None:
    page = Page(blocks((CHECKOUT / "README.md").read_text()))
    for heading, number in ELSEWHERE:
        page.take(heading, number)


def test_the_other_gateway_s_file() -> None:
    there = (
        'name = "nsg"\nlisten = ["198.51.100.1:5091"]\nvia = "10.0.0.2"\nother = "psg" # 192.0.2.10, xpsg\n'
    )
    here = 'name = "psg"\nlisten = ["192.0.2.1:5091"]\nvia = "10.0.0.3"\nother = "nsg" # 192.0.2.10, xpsg\n'
    assert (swapped(here), swapped(there)) == (there, here)
    assert swapped("psg.pem psg-ike.pem") == "nsg.pem nsg-ike.pem"
