"""`python -m megatron_qwen` is the same command as `megatron-qwen`."""

from megatron_qwen.cli.app import main

if __name__ == "__main__":
    main()
