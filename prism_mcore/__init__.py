"""Mid-training, reinforcement learning, evaluation and analysis of open 3-24B language models on megatron-core."""

import warnings

# megatron-core warns, at import and a dozen times per rank, about Apex and about names that newer torch deprecates;
# tools/doctor.py says what is installed. Here, because it must come before megatron-core is imported.
warnings.filterwarnings("ignore", module=r"megatron\.core|torch\.distributed|torch\.jit")
