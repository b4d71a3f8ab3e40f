"""Short names of options on the command line, the same in `vgen` and in scripts."""

FLAGS = {
    "steps": "num_inference_steps",
    "guidance": "guidance_scale",
    "history-guidance": "history_guidance_scale",
    "negative": "negative_prompt",
}
"""Names of options by their short names."""
REPEATABLE = ("lora",)
"""Lists whose option appends one value."""
