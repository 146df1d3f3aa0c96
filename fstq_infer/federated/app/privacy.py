"""What a configured privacy mechanism wraps around strategy and mods; unsound combinations are refused at the start."""

from __future__ import annotations

from typing import Any

from fstq_infer.errors import OptionError, PrivacyOrderError
from fstq_infer.federated.app.config import Config
from fstq_infer.federated.order import check_clipping, masked
from fstq_infer.lazy import load

MEANS = ("FedAvg", "FedProx")  # strategies whose result is the mean that the noise is made for
STRATEGY, MOD = "flwr.serverapp.strategy:DifferentialPrivacy", "flwr.clientapp.mod:"


def check(config: Config) -> None:
    """Raises PrivacyOrderError with the reason, or OptionError for a missing key."""
    kind, messages = config.privacy.kind, config.messages
    if kind == "secagg":
        raise PrivacyOrderError(masked("[privacy] kind = 'secagg'"))
    if kind.startswith("client-"):
        check_clipping(messages.preset)
    if kind == "local" and config.train.fisher and messages.preset in ("fstq", "paper"):
        raise PrivacyOrderError(
            "noise on clients makes weights private, but the Fisher that chooses coordinates comes from raw gradients. "
            "Set [train] fisher = false."
        )
    if not central(config):
        return
    if messages.preset == "mosaic":
        raise PrivacyOrderError(
            "the server clips each reply, but mosaic messages are completed from each other, so one client would have "
            "a part in several. Use another [messages] preset."
        )
    if config.privacy.clients is None:
        raise OptionError(
            f"[privacy] kind {kind!a} needs 'clients', how many a round draws: the noise of their mean depends on it."
        )
    if config.server.strategy not in MEANS:
        raise PrivacyOrderError(
            f"Flower adds noise that is made for a mean to what the strategy returns, but {config.server.strategy} "
            f"returns something else. Use {' or '.join(MEANS)}."
        )
    if config.server.enough is not None and config.server.enough < config.privacy.clients:
        raise PrivacyOrderError(
            f"[server] enough = {config.server.enough} ends a round with fewer replies than [privacy] clients = "
            f"{config.privacy.clients}, so each would weigh more than the noise is made for. Raise 'enough'."
        )


def central(config: Config) -> bool:
    """Whether the server adds noise; clients then weigh the same, and a round with too few of them is not used."""
    return config.privacy.kind.startswith(("server-", "client-"))


def wrapped(inner: Any, config: Config) -> Any:
    """The inner strategy, in Flower's privacy wrapper where one is configured; FstqStrategy goes around it."""
    check(config)
    privacy = config.privacy
    if not central(config):
        return inner
    side, _, how = privacy.kind.partition("-")
    cls = load(f"{STRATEGY}{side.title()}Side{how.title()}Clipping", "privacy", "federated")
    norm = {"clipping_norm" if how == "fixed" else "initial_clipping_norm": privacy.clipping_norm}
    return cls(inner, noise_multiplier=privacy.noise_multiplier, num_sampled_clients=privacy.clients, **norm)


def mods(config: Config) -> list[Any]:
    """Flower's mods of a client; fstq_mod comes before them."""
    check(config)
    privacy = config.privacy
    if privacy.kind == "local":
        made = load(f"{MOD}LocalDpMod", "privacy", "federated")
        return [made(privacy.clipping_norm, privacy.sensitivity, privacy.epsilon, privacy.delta)]
    if privacy.kind.startswith("client-"):
        return [load(f"{MOD}{privacy.kind.removeprefix('client-')}clipping_mod", "privacy", "federated")]
    return []
