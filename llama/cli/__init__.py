"""The command line: chat, complete, inspect, convert, finetune, bench."""
