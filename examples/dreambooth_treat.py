# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Treat a personalised pipeline: a LoRA of one person or thing, on its instance prompt, and judge it in other places.

The LoRA, as a DreamBooth script of diffusers trains it, is merged into SDXL; what is learnt is a second LoRA upon it. This is `diffdoctor
treat --config sdxl` with a `--base_lora` and an `--instance_prompt`; `--pipeline` and `--config` name another model.

One GPU:
    accelerate launch examples/dreambooth_treat.py --base_lora my-dog/ --instance_prompt "a photo of sks dog" \
        --detector detector/ --output_dir my-dog-treated

Held out are sixteen other places; your own prompts:
    accelerate launch examples/dreambooth_treat.py --base_lora my-dog/ --instance_prompt "a photo of sks dog" \
        --eval_prompts prompts.txt --detector detector/ --output_dir my-dog-treated
"""

import sys

from diffdoctor import command_module


if __name__ == "__main__":
    sys.exit(
        command_module("treat").run(
            sys.argv[1:], "stabilityai/stable-diffusion-xl-base-1.0", "sdxl", prog="dreambooth_treat.py"
        )
    )
