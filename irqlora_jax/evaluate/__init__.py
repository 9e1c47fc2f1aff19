"""What a model knows: loss, perplexity, multiple-choice questions."""

from irqlora_jax.evaluate.perplexity import evaluation_loss as evaluation_loss
from irqlora_jax.evaluate.perplexity import perplexity as perplexity
from irqlora_jax.evaluate.questions import Question as Question
from irqlora_jax.evaluate.questions import QuestionScores as QuestionScores
from irqlora_jax.evaluate.questions import load_questions as load_questions
from irqlora_jax.evaluate.questions import score_questions as score_questions
