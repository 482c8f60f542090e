"""transformers' Trainer as the recipe wants it: its arguments, which parameters decay, where checkpoints go."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import transformers
from transformers import PreTrainedTokenizerFast, TrainerCallback, TrainingArguments

from ophis.models import LanguageModel
from ophis.training.callbacks import Ending, LossCurve, Publish, StopAtNonsense
from ophis.training.data import Data, collate
from ophis.training.optimizer import decaying
from ophis.training.recipe import Recipe
from ophis.training.run_folder import RunFolder


class Trainer(transformers.Trainer):
    """Steps, schedule, mixed precision, accumulation, several processes and the resumable state are transformers'."""

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: PreTrainedTokenizerFast,
        data: Data,
        recipe: Recipe,
        folder: RunFolder,
        callbacks: Sequence[TrainerCallback] = (),
    ):
        args = training_arguments(recipe, folder)
        tokens = recipe.batch_size * recipe.accumulate * recipe.length * args.world_size
        self.ending = Ending()
        super().__init__(
            model=model,
            args=args,
            data_collator=collate,
            train_dataset=data.train,
            eval_dataset=data.held_out,
            processing_class=tokenizer,
            callbacks=[
                self.ending,
                Publish(folder, recipe.keep),
                LossCurve(folder.losses_file, tokens, data.bits_per_byte),
                StopAtNonsense(),
                *callbacks,
            ],
        )
        self.remove_callback(transformers.PrinterCallback)

    def get_decay_parameter_names(self, model) -> list[str]:
        return decaying(model)


def training_arguments(recipe: Recipe, folder: RunFolder) -> TrainingArguments:
    args = TrainingArguments(
        output_dir=str(folder.unfinished),
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.batch_size,
        per_device_eval_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.accumulate,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr": min(recipe.final_learning_rate, recipe.learning_rate)},
        warmup_steps=math.ceil(recipe.warmup * recipe.steps),
        weight_decay=recipe.weight_decay,
        adam_beta1=recipe.betas[0],
        adam_beta2=recipe.betas[1],
        max_grad_norm=recipe.clip,
        bf16=recipe.precision == "bfloat16",
        seed=recipe.seed,
        data_seed=recipe.seed,
        logging_steps=recipe.log_every,
        eval_strategy="steps",
        eval_steps=recipe.evaluate_every,
        save_strategy="steps",
        save_steps=recipe.save_every,
        prediction_loss_only=True,
        remove_unused_columns=False,
        logging_nan_inf_filter=False,  # a loss that is not a number is to be seen
        use_cache=True,  # what the saved configuration says; training keeps no states anyway
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=True,
        log_level="error",
        log_level_replica="error",
        ddp_find_unused_parameters=False,
        report_to="none",
    )
    # Several GPUs are torchrun's business; in one process, Trainer would spread the batch over them by threads.
    args._n_gpu = min(args.n_gpu, 1)
    return args
