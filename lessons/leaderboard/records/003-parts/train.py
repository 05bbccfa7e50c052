"""Record 3: value embeddings, smear and backout: parts that cost few FLOPs. One thing changed: the model."""
import torch

from nanochat.checkpoint_manager import empty_model
from nanochat.dataloader import tokenizing_distributed_data_loader_bos_bestfit
from nanochat.scaling import TINY, gpt_config
from nanochat.tokenizer import RustBPETokenizer

ROWS, LENGTH, MARGIN = 8, 512, 4


def schedule(share):
    """Warm up over 3% of the time, stay, fall to 5% over the last 65%."""
    return min(share / .03, 1.0, .05 + .95 * (1 - share) / .65)


def train(run):
    tokenizer = RustBPETokenizer.train_from_iterator(run.documents, 4096)
    model = empty_model(gpt_config(4, tokenizer.get_vocab_size(), LENGTH, window_pattern='L', layer_scalars=False), torch.device('cpu'))
    rates = {k: v * TINY['lr_scale'] for k, v in dict(unembedding_lr=.008, embedding_lr=.3, matrix_lr=.02, scalar_lr=.5).items()}
    optimizer = model.setup_optimizer(**rates, weight_decay=TINY['weight_decay'])
    batches = tokenizing_distributed_data_loader_bos_bestfit(tokenizer, ROWS, LENGTH, 'train', corpus=run.documents, long_documents='split')
    step = 0
    while run.seconds_left() > MARGIN:
        for group in optimizer.param_groups: group['lr'] = group['initial_lr'] * schedule(run.share())
        loss = model(*next(batches))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if step % 20 == 0: run.log(step=step, loss=round(loss.item(), 4))
    return model, tokenizer
