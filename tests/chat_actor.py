"""A stand-in for an engine, for tests of the chat: it repeats the last question, slowly, and writes down what it said and when it was closed."""
import itertools, json, os, sys, time
from types import SimpleNamespace

from nanochat.common import UserError
from nanochat.tokenizer import RustBPETokenizer

CORPUS = ['the quick brown fox says what is 12*7 and 你好 🦜 def f(x): return x'] * 3


def make_tokenizer(): return RustBPETokenizer.train_from_iterator(CORPUS, 300)


class Parrot:
    """`generate` gives the question's own words again and again; `tool` in it calls the calculator first, `brief` says them once,
    `slowly` takes eight times as long, `crowded` is refused. Each event is a line in `log`."""
    def __init__(self, tokenizer, log=None, delay=0.02, repeat=400, limit=2048):
        self.tokenizer, self.log, self.delay, self.repeat = tokenizer, log, delay, repeat
        self.model = SimpleNamespace(config=SimpleNamespace(sequence_len=limit))

    def note(self, **event):
        if self.log:
            with open(self.log, 'a') as f: f.write(json.dumps(event) + '\n')

    def script(self, question):
        t, special = self.tokenizer, self.tokenizer.encode_special
        tool = [special('<|python_start|>'), *t.encode('12*7'), special('<|python_end|>'), special('<|output_start|>'), *t.encode('84'), special('<|output_end|>')]
        return itertools.chain(tool if 'tool' in question else [], itertools.chain.from_iterable(t.encode(f'{question}🦜 ') for _ in range(1 if 'brief' in question else self.repeat)), [special('<|assistant_end|>')])

    def generate(self, tokens, max_tokens=None, temperature=1.0, top_k=None, seed=42, top_p=None):
        text = self.tokenizer.decode(tokens)
        question = text.rsplit('<|user_start|>', 1)[1].split('<|user_end|>')[0]
        if 'crowded' in question: raise UserError('64 requests are waiting already; try again in 3 seconds')
        self.note(event='start', prompt=text, question=question, temperature=temperature, top_k=top_k, seed=seed, top_p=top_p, max_tokens=max_tokens)
        said = 0
        try:
            for said, token in enumerate(itertools.islice(self.script(question), max_tokens), 1):
                time.sleep(self.delay * (8 if 'slowly' in question else 1))
                yield [token], [1]
        finally: self.note(event='end', question=question, said=said, time=time.time())


if __name__ == '__main__':  # python chat_actor.py LOG DELAY REPEAT LIMIT: serve on a free port and print the address
    from nanochat.demo import build_demo, look
    demo = build_demo(Parrot(make_tokenizer(), sys.argv[1], float(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])), info='parrot · step 7')
    _, url, _ = demo.launch(server_name='127.0.0.1', prevent_thread_lock=True, quiet=True, share=False, ssr_mode=False, footer_links=[], **look())
    print(url, flush=True)
    demo.block_thread()
