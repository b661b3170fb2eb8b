"""Goes on from four prompts with a pretrained model: the demo model, or a checkpoint of yours.

python example_text_completion.py
torchrun --nproc_per_node 1 example_text_completion.py --ckpt_dir DIR --tokenizer_path DIR/tokenizer.model
"""

from typing import Literal

from llama import Llama
from llama.cli.program import checkpoint_or_demo, run
from llama.parallel import is_main_process


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
) -> None:
    """Complete the example prompts.

    Args:
        ckpt_dir: directory of the checkpoint; the demo model where not given.
        tokenizer_path: the tokenizer's file; tokenizer.model in ckpt_dir where not given.
        temperature: 0 takes the likeliest token; higher is more varied.
        top_p: draw from the likeliest tokens that make up this mass, in (0, 1].
        max_seq_len: longest prompt and completion together, in tokens.
        max_gen_len: longest completion, in tokens.
        max_batch_size: most prompts completed at once.
        device: cpu, cuda or mps; the best there is where not given.
        dtype: bfloat16, float16 or float32; the best for the device where not given.
        seed: the same seed gives the same text.
        compile: let torch.compile make the decoding steps before the first answer.
        quantization: int8 or int4 rounds matrices as they are loaded; none where not given.
    """
    llama = Llama.build(
        ckpt_dir=checkpoint_or_demo(ckpt_dir),
        tokenizer_path=tokenizer_path,
        max_seq_len=max_seq_len,
        max_batch_size=max_batch_size,
        seed=seed,
        device=device,
        dtype=dtype,
        compile=compile,
        quantization=quantization,
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
