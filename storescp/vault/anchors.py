"""The anchors that a configuration names: files, and the keys of a token, side by side.

Source: docs/anchors.md.
"""

from __future__ import annotations

from keys.anchors import AnchorSet, FileAnchors, TokenAnchors
from keys.secret import Credential
from keys.token import AttachedToken, TokenError, read_pin
from storescp.config import Config


def anchors_of(config: Config, pin: str | None = None) -> AnchorSet:
    """Return the anchors of a store; new ones come from the kind that ``keys.anchor`` names.

    Nothing is attached yet: a token has to be there when an anchor on it is made, used or destroyed, and at no other
    time. Each time the PIN is read anew, so that nobody has it in memory meanwhile.

    Args:
        config: The configuration.
        pin: The token's PIN where somebody typed it; else it is read where ``keys.anchor_pin`` says.
    """
    files = FileAnchors(config.anchors)
    if config.anchor_token is None:
        return AnchorSet(files)
    token = TokenAnchors(config.anchors, lambda: attach(config, pin))
    return AnchorSet(token, files) if config.settings.keys.anchor == "token" else AnchorSet(files, token)


def attach(config: Config, pin: str | None = None) -> AttachedToken:
    """Attach the token that the configuration names.

    Raises:
        TokenError: It is not here or fails, or its PIN is not here or another one.
    """
    if config.anchor_token is None:
        raise TokenError("the configuration names no token (keys.anchor_token)")
    module, label = config.anchor_token
    place = config.anchor_pin_file or Credential(config.anchor_pin_credential)
    return AttachedToken(module, label, pin if pin is not None else read_pin(place))
