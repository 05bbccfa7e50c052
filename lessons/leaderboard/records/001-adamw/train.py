"""Record 1: a plain GPT trained with AdamW, as many would write it. What comes later is measured against it."""
import torch

from nanochat.checkpoint_manager import empty_model
from nanochat.dataloader import tokenizing_distributed_data_loader_bos_bestfit
from nanochat.scaling import gpt_config
from nanochat.tokenizer import RustBPETokenizer

PLAIN = dict(value_embeds=False, smear=False, backout=False, layer_scalars=False, qk_scale=1.0)
RATE, ROWS, LENGTH, MARGIN = 2e-3, 8, 512, 4  # MARGIN: seconds kept for the last step and for handing over


def schedule(share):
    """Warm up over 3% of the time, stay, fall to 5% over the last 65%."""
    return min(share / .03, 1.0, .05 + .95 * (1 - share) / .65)


def train(run):
    tokenizer = RustBPETokenizer.train_from_iterator(run.documents, 4096)
    model = empty_model(gpt_config(4, tokenizer.get_vocab_size(), LENGTH, window_pattern='L', **PLAIN), torch.device('cpu'))
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(.9, .95), weight_decay=.1)
    batches = tokenizing_distributed_data_loader_bos_bestfit(tokenizer, ROWS, LENGTH, 'train', corpus=run.documents, long_documents='split')
    step = 0
    while run.seconds_left() > MARGIN:
        for group in optimizer.param_groups: group['lr'] = RATE * schedule(run.share())
        loss = model(*next(batches))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if step % 20 == 0: run.log(step=step, loss=round(loss.item(), 4))
    return model, tokenizer
