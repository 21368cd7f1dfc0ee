# SPDX-License-Identifier: Apache-2.0
"""A tokenizer for tests that needs no model."""

from __future__ import annotations

import re
from typing import Any


class Pieces:
    """Up to four letters, spaces and signs are tokens; it has a chat template.

    Of a long text only the beginning counts, to be quick.
    """

    chat_template = "yes"

    def __init__(self) -> None:
        self.known: dict[str, int] = {}
        self.texts: list[str] = []

    def __call__(self, text: Any, add_special_tokens: bool = True) -> dict[str, Any]:
        if isinstance(text, list):
            return {"input_ids": [self(one)["input_ids"] for one in text]}
        return {
            "input_ids": [
                self._token(p) for p in re.findall(r" ?\w{1,4}|\s|[^\w\s]", text[:60_000])
            ]
        }

    def _token(self, piece: str) -> int:
        if piece not in self.known:
            self.known[piece] = len(self.texts)
            self.texts.append(piece)
        return self.known[piece]

    def decode(self, tokens: Any) -> str:
        return "".join(self.texts[token] for token in tokens)

    def apply_chat_template(self, chat: list[dict[str, str]], **options: Any) -> str:
        assert options == {"add_generation_prompt": True, "tokenize": False}
        return f"<user>{chat[0]['content']}<assistant>\n"
