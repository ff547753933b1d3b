"""ReBRAC: revisiting the minimalist approach to offline RL (Tarasov et al., 2023).

Faithful to CORL's implementation: LayerNorm in the critics only, separate penalties of actor and
critic, the smaller critic in the actor's loss. Differs: LayerNorm's epsilon is PyTorch's 1e-5.
Known gaps: needs each transition's next action, so it learns from data alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from rl_shift.agent import Batch, Metrics
from rl_shift.agents.td3_bc import TD3BC
from rl_shift.networks import ActionValues, DeterministicActor, EnsembleCritic, initialise


class ReBRAC(TD3BC):
    """TD3+BC with penalties of their own for actor and critic, deeper and with LayerNorm.

    L(critic) = sum_i E (Q_i(s, a) - y)^2,        a~ = clip(pi'(s') + clipped noise)
    y         = r + gamma (1 - terminated) (min_i Q'_i(s', a~) - beta_c |a~ - a'|^2)
    L(actor)  = E beta_a |pi(s) - a|^2 - lambda E min_i Q_i(s, pi(s)),
    lambda    = 1 / E|min_i Q_i(s, pi(s))|;  a' is the data's next action, |.|^2 sums dimensions
    """

    columns = ("next_action",)

    @dataclass(frozen=True)
    class Config:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Hyper-parameters of ReBRAC; CORL's values for hopper-medium."""

        batch_size: int = 1024  # CORL on MuJoCo; 256 elsewhere
        hidden: tuple[int, ...] = (256, 256, 256)
        actor_learning_rate: float = 1e-3  # Adam; CORL on MuJoCo, 3e-4 elsewhere
        critic_learning_rate: float = 1e-3  # Adam; CORL on MuJoCo, 3e-4 elsewhere, antmaze 5e-5
        discount: float = 0.99  # antmaze: 0.999
        tau: float = 0.005  # target averaging
        actor_bc_coef: float = 0.01  # beta_a
        critic_bc_coef: float = 0.01  # beta_c
        policy_noise: float = 0.2  # target smoothing
        noise_clip: float = 0.5
        policy_delay: int = 2  # critic updates per actor update
        layer_norm: bool = True  # critics only
        normalize: bool = False  # observations; CORL: off

    def networks(self, obs: int, action: int) -> tuple[DeterministicActor, ActionValues]:
        """LayerNorm in the critics only; EDAC's initialisation of both."""
        c = self.config
        actor = DeterministicActor(obs, c.hidden, action)
        critic = EnsembleCritic(obs, action, c.hidden, layer_norm=c.layer_norm)
        initialise(actor.net, hidden_bias=0.1, last=1e-3)
        initialise(critic.net, hidden_bias=0.1, last=3e-3)
        return actor, critic

    def learning_rates(self) -> dict[str, float]:
        """Adam's rate of each network."""
        return {
            "actor": self.config.actor_learning_rate,
            "critic": self.config.critic_learning_rate,
        }

    def critic_loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """Smoothed, pessimistic target, less the penalty for leaving the data."""
        c = self.config
        action = self.smoothed_action(batch["next_obs"])
        penalty = (action - batch["next_action"]).square().sum(-1)
        next_q = self.target_critic(batch["next_obs"], action).amin(0)
        next_q = next_q - c.critic_bc_coef * penalty
        target = batch["reward"] + c.discount * ~batch["terminated"] * next_q
        q = self.critic(batch["obs"], batch["action"])
        loss = (q - target).square().mean(-1).sum()
        return loss, {"critic/loss": loss, "critic/q": q.mean(), "critic/penalty": penalty.mean()}

    def actor_loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """Climb the smaller critic, stay near the data."""
        action = self.actor(batch["obs"])
        penalty = (action - batch["action"]).square().sum(-1).mean()
        q = self.critic(batch["obs"], action).amin(0)
        loss = self.config.actor_bc_coef * penalty - q.mean() / q.abs().mean().detach()
        return loss, {"actor/loss": loss, "actor/penalty": penalty}

    def act(self, obs: Tensor, explore: bool) -> Tensor:
        """(N, obs) -> (N, action)."""
        action: Tensor = self.actor(self.normalizer(obs))
        return action
