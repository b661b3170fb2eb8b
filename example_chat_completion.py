"""Answers four dialogs with a chat model: the demo model, or a checkpoint of yours.

python example_chat_completion.py
torchrun --nproc_per_node 1 example_chat_completion.py --ckpt_dir DIR --tokenizer_path DIR/tokenizer.model
"""

from typing import Literal

from llama.cli.program import checkpoint_or_demo, run


def main(
    ckpt_dir: str | None = None,
    tokenizer_path: str | None = None,
    temperature: float = 0.6,
    top_p: float = 0.9,
    max_seq_len: int = 512,
    max_batch_size: int = 4,
    max_gen_len: int | None = None,
    device: str | None = None,
    dtype: str | None = None,
    seed: int = 1,
    compile: bool = False,
    quantization: Literal["int8", "int4"] | None = None,
    adapter_dir: str | None = None,
) -> None:
    """Answer the example dialogs.

    Args:
        ckpt_dir: directory of the checkpoint (default: the demo model).
        tokenizer_path: the tokenizer's file (default: the one in ckpt_dir).
        temperature: 0 takes the likeliest token; higher values vary more.
        top_p: draw from the likeliest tokens of this mass, in (0, 1].
        max_seq_len: most tokens of a prompt and its answer.
        max_batch_size: most dialogs at a time.
        max_gen_len: most tokens of an answer (default: as max_seq_len allows).
        device: cpu, cuda or mps (default: the best there is).
        dtype: bfloat16, float16, float32, or auto: as in the files (default: the best for the device).
        seed: the same seed gives the same answers.
        compile: compile or capture decoding steps before the first answer.
        quantization: int8 or int4 rounds matrices while loading (default: none).
        adapter_dir: directory of an adapter of peft's, merged while loading (default: none).
    """
    from llama import Dialog, Llama  # here, so that Ctrl-C ends the program in one line while torch is imported
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

    dialogs: list[Dialog] = [
        [{"role": "user", "content": "What is the recipe of mayonnaise?"}],
        [
            {"role": "user", "content": "I am going to Paris, what should I see?"},
            {
                "role": "assistant",
                "content": "Paris has much to see. Start with these:\n\n"
                "1. The Eiffel Tower: an iron tower with a view over the whole city.\n"
                "2. The Louvre: a museum with thousands of works of art.\n"
                "3. Notre-Dame: an old church on an island in the river.",
            },
            {"role": "user", "content": "What is so great about the first one?"},
        ],
        [
            {"role": "system", "content": "Always answer with Haiku"},
            {"role": "user", "content": "I am going to Paris, what should I see?"},
        ],
        [
            {"role": "system", "content": "Always answer with emojis"},
            {"role": "user", "content": "How do I get from London to New York?"},
        ],
    ]
    results = llama.chat_completion(dialogs, max_gen_len=max_gen_len, temperature=temperature, top_p=top_p)

    if is_main_process():
        for dialog, result in zip(dialogs, results, strict=True):
            for message in dialog:
                print(f"{message['role'].capitalize()}: {message['content']}\n")
            answer = result["generation"]
            print(f"> {answer['role'].capitalize()}: {answer['content']}")
            print("\n==================================\n")


if __name__ == "__main__":
    run(main)
