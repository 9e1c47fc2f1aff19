"""What a person sees of a run: lines and tables while it goes on, and a page when it has ended."""

from irqlora_jax.report.scores import Row as Row
from irqlora_jax.report.scores import Scorer as Scorer
from irqlora_jax.report.scores import aligned as aligned
from irqlora_jax.report.scores import baselines as baselines
from irqlora_jax.report.scores import describe as describe
from irqlora_jax.report.scores import mean_entropy as mean_entropy
from irqlora_jax.report.scores import next_commands as next_commands
from irqlora_jax.report.scores import peak_memory as peak_memory
from irqlora_jax.report.scores import readable_size as readable_size
from irqlora_jax.report.scores import table as table
