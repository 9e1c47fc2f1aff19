"""Evaluates a model: loss, perplexity, multiple-choice questions, MMLU."""

from irqlora_jax.evaluate.choices import Question as Question
from irqlora_jax.evaluate.choices import choice_scores as choice_scores
from irqlora_jax.evaluate.mmlu import MmluScores as MmluScores
from irqlora_jax.evaluate.mmlu import mmlu as mmlu
from irqlora_jax.evaluate.perplexity import TextScores as TextScores
from irqlora_jax.evaluate.perplexity import evaluation_loss as evaluation_loss
from irqlora_jax.evaluate.perplexity import perplexity as perplexity
from irqlora_jax.evaluate.perplexity import score_text as score_text
from irqlora_jax.evaluate.questions import QuestionScores as QuestionScores
from irqlora_jax.evaluate.questions import load_questions as load_questions
from irqlora_jax.evaluate.questions import score_questions as score_questions
