"""R1-Zero: the prompt and the settings of reinforcement learning on a base model, without supervised fine-tuning.

Settings are those of the Nature version (methods and supplement); what the paper leaves open is marked "choice".
"""

from research.core.optim import OptimConfig
from research.rl.losses import LossConfig
from research.rl.trainer import Config, RolloutConfig

# A plain paragraph, no chat template, nothing about how to reason; the policy writes `<think>` itself. Same structure
# as the paper's Table 1 in our words: for released R1-Zero weights, pass the table's own string.
TEMPLATE = (
    "Below, a User puts a question to an Assistant. Before replying, the Assistant works out its reasoning, written as "
    "<think> reasoning </think>, and then gives the reply as <answer> answer </answer>. User: {question}. Assistant:"
)


def paper() -> Config:
    """R1-Zero as published: 512 questions x 16 responses for each rollout, 16 minibatches of 512, one pass.

    Learning rate 3e-6, KL 0.001 against a reference renewed every 400 updates, temperature 1, responses of up to 32,768
    tokens and 65,536 from update 8,200 on; 10,400 updates. The clip ratio is not stated for R1-Zero; R1's first stage
    uses 10. Choices: AdamW without decay, gradients clipped to norm 1, population of the deviation N - 1.
    """
    updates = 16
    return Config(
        rollout=RolloutConfig(
            prompts=512,
            group_size=16,
            temperature=1.0,
            max_prompt=2048,
            max_new_tokens=32_768,
            # The switch falls on the first rollout that starts at or after update 8,200.
            length_schedule=((-(-8_200 // updates), 65_536),),
            template=TEMPLATE,
        ),
        loss=LossConfig(aggregation="grpo", clip_low=10.0, clip_high=10.0, kl_coef=0.001),
        updates=updates,
        reference_every=400,
        optim=OptimConfig(lr=3e-6, weight_decay=0.0, clip_norm=1.0),
    )
