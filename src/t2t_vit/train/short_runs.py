"""Scale what was configured for a long run on many images down to a short one on few."""

from dataclasses import replace

from .config import Config


def scale_to_data(config: Config, images: int, processes: int = 1) -> tuple[Config, list[str]]:
    """Reduce batch size, warm-up, cooldown, first and last learning rate to what so few images and epochs allow.

    Args:
        config: A configuration; it stays as it is.
        images: Number of training images.
        processes: Number of processes that share a batch.

    Returns:
        The configuration, and a note for each change.
    """
    notes: list[str] = []
    tuning = config.optimizer
    micro = processes * config.grad_accum_steps
    unit = micro * (2 if config.augment.mixup or config.augment.cutmix else 1)  # a batch is a multiple of this
    if config.batch_size > images >= unit:
        size = images // unit * unit
        notes.append(
            f'note      batch_size {config.batch_size} reduced to {size}: there are {images:,} training images'
        )
        config = replace(config, batch_size=size)
    if tuning.warmup_epochs + tuning.cooldown_epochs >= config.epochs:
        share = config.epochs // 5
        warmup, cooldown = min(tuning.warmup_epochs, share), min(tuning.cooldown_epochs, share)
        notes.append(
            f'note      warm-up reduced from {tuning.warmup_epochs} to {warmup} epochs and cooldown from '
            f'{tuning.cooldown_epochs} to {cooldown}: the run has {config.epochs}'
        )
        tuning = replace(tuning, warmup_epochs=warmup, cooldown_epochs=cooldown)
    if tuning.min_lr > config.lr:
        notes.append(f'note      optimizer.min_lr reduced from {tuning.min_lr:g} to {config.lr / 100:g}: lr is lower')
        tuning = replace(tuning, min_lr=config.lr / 100)
    if tuning.warmup_epochs and tuning.warmup_lr > config.lr:
        notes.append(
            f'note      optimizer.warmup_lr reduced from {tuning.warmup_lr:g} to {config.lr / 100:g}: lr is lower'
        )
        tuning = replace(tuning, warmup_lr=config.lr / 100)
    return replace(config, optimizer=tuning), notes
