"""Continues four prompts with a pretrained model: the demo model, or a checkpoint of yours.

python example_text_completion.py
torchrun --nproc_per_node 1 example_text_completion.py --ckpt_dir DIR --tokenizer_path DIR/tokenizer.model
"""

from typing import Literal

from llama.cli.program import checkpoint_or_demo, run


def main(
    ckpt_dir: str | None = None,
    tokenizer_path: str | None = None,
    temperature: float = 0.6,
    top_p: float = 0.9,
    max_seq_len: int = 128,
    max_gen_len: int = 64,
    max_batch_size: int = 4,
    device: str | None = None,
    dtype: str | None = None,
    seed: int = 1,
    compile: bool = False,
    quantization: Literal["int8", "int4"] | None = None,
    adapter_dir: str | None = None,
) -> None:
    """Complete the example prompts.

    Args:
        ckpt_dir: directory of the checkpoint (default: the demo model).
        tokenizer_path: the tokenizer's file (default: the one in ckpt_dir).
        temperature: 0 takes the likeliest token; higher values vary more.
        top_p: draw from the likeliest tokens of this mass, in (0, 1].
        max_seq_len: most tokens of a prompt and its completion.
        max_gen_len: most tokens of a completion.
        max_batch_size: most prompts at a time.
        device: cpu, cuda or mps (default: the best there is).
        dtype: bfloat16, float16, float32, or auto: as in the files (default: the best for the device).
        seed: the same seed gives the same text.
        compile: compile or capture decoding steps before the first answer.
        quantization: int8 or int4 rounds matrices while loading (default: none).
        adapter_dir: directory of an adapter of peft's, merged while loading (default: none).
    """
    from llama import Llama  # here, so that Ctrl-C ends the program in one line while torch is imported
    from llama.parallel import is_main_process

    llama = Llama.build(
        ckpt_dir=checkpoint_or_demo(ckpt_dir, adapter_dir),
        tokenizer_path=tokenizer_path,
        max_seq_len=max_seq_len,
        max_batch_size=max_batch_size,
        seed=seed,
        device=device,
        dtype=dtype,
        compile=compile,
        quantization=quantization,
        adapter_dir=adapter_dir,
    )

    prompts = [
        "To me, the meaning of life is",
        "Put simply, the theory of relativity says that",
        "A short message to congratulate our team on the launch:\n\nHello everyone,\n\nI just",
        # A few examples in the prompt show the model what to do with the last line.
        "Translate English to French:\n\nsea => mer\nbread => pain\napple => pomme\ncheese =>",
    ]
    results = llama.text_completion(prompts, max_gen_len=max_gen_len, temperature=temperature, top_p=top_p)

    if is_main_process():
        for prompt, result in zip(prompts, results, strict=True):
            print(prompt)
            print(f"> {result['generation']}")
            print("\n==================================\n")


if __name__ == "__main__":
    run(main)
