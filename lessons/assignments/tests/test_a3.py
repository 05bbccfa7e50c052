"""Tests of assignment 3, Muon: against the singular value decomposition, to whose values the polynomials are applied as plain numbers."""
import pytest
import torch

TITLE = 'Muon'
EXERCISES = {1: 'Momentum with a look ahead', 2: 'Newton-Schulz', 3: 'Polar Express', 4: 'One step of Muon'}

# arXiv 2505.16932, as the notebook gives them
EXPRESS = [(8.156554524902461, -22.48329292557795, 15.878769915207462), (4.042929935166739, -2.808917465908714, 0.5000178451051316),
           (3.8916678022926607, -2.772484153217685, 0.5060648178503393), (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
           (2.3465413258596377, -1.7097828382687081, 0.42323551169305323)]


def normal(rng, *shape):
    """Normal numbers that depend on the seed of the grading."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(rng.randrange(2**40)))


def close(a, b, tolerance=2e-3):
    """Whether two tensors have one shape and nearly equal values."""
    if not isinstance(a, torch.Tensor): raise AssertionError(f'a tensor was expected, not {type(a).__name__}')
    if a.shape != b.shape: raise AssertionError(f'the shape is {tuple(a.shape)}, not {tuple(b.shape)}')
    worst = (a.double() - b.double()).abs().max().item()
    if not worst <= tolerance: raise AssertionError(f'values are off by up to {worst:.3g}')
    return True


def by_svd(G, polynomials, margin=1.0):
    """The matrix whose singular values are those of G / (margin |G|) after the odd polynomials."""
    U, s, V = torch.linalg.svd(G.double(), full_matrices=False)
    s = s / (margin * G.double().norm())
    for a, b, c in polynomials: s = a * s + b * s**3 + c * s**5
    return (U * s @ V).float()


def cubic(steps): return [(1.5, -0.5, 0.0)] * steps


# 1. Momentum with a look ahead
@pytest.mark.points(1, exercise=1)
def test_buffer(student, rng):
    "The buffer moves a share 1 - m towards the gradient. With m = 0.9 it keeps nine tenths of itself, not one tenth; and the gradient is not added whole."
    g, b = normal(rng, 3, 4), normal(rng, 3, 4)
    assert close(student.nesterov(g, b, 0.9)[1], 0.9 * b + 0.1 * g, 1e-5)


@pytest.mark.points(2, exercise=1)
def test_look_ahead(student, rng):
    "The update mixes the gradient with the new buffer, the one that has already seen this gradient; returning the buffer itself is plain momentum."
    g, b = normal(rng, 3, 4), normal(rng, 3, 4)
    assert close(student.nesterov(g, b, 0.8)[0], 0.2 * g + 0.8 * (0.8 * b + 0.2 * g), 1e-5)


@pytest.mark.points(1, exercise=1)
def test_momentum_changes_nothing_given(student, rng):
    "Return new tensors: an operation whose name ends in an underscore changes the caller's gradient or buffer."
    g, b = normal(rng, 2, 2), normal(rng, 2, 2)
    reply = student.request('nesterov', g, b, 0.9, after=True)
    assert close(reply.value[1], 0.9 * b + 0.1 * g, 1e-5) and close(reply.after[0], g, 0) and close(reply.after[1], b, 0)


# 2. Newton-Schulz
@pytest.mark.points(2, exercise=2)
def test_newton_schulz(student, rng):
    "Each round sends s to 1.5 s - 0.5 s^3. Check the sign and the factor of the cubic term, and the order of the three matrices in it."
    G = normal(rng, 4, 6)
    for steps in (1, 5): assert close(student.newton_schulz(G, steps), by_svd(G, cubic(steps)))


@pytest.mark.points(1, exercise=2)
def test_newton_schulz_scale(student, rng):
    "Divide by the norm first: outside of 0 to sqrt(3) the polynomial runs away, and a gradient may have any size."
    G = normal(rng, 3, 5)
    for size in (1e-3, 1e3): assert close(student.newton_schulz(size * G, 12), by_svd(G, cubic(12)))


@pytest.mark.points(1, exercise=2)
def test_newton_schulz_tall(student, rng):
    "A tall matrix comes back tall: transposed before, it has to be transposed again after."
    G = normal(rng, 7, 3)
    assert close(student.newton_schulz(G, 6), by_svd(G, cubic(6)))


@pytest.mark.points(1, exercise=2)
def test_newton_schulz_cost(student, rng):
    "Work on the smaller side: a matrix of 4 x 64 needs squares of 4 x 4, whichever way it lies, and two products a round."
    for shape in ((4, 64), (64, 4)):
        reply = student.request('newton_schulz', (G := normal(rng, *shape)), 5)
        assert close(reply.value, by_svd(G, cubic(5))) and reply.products <= 10 and reply.flops <= 5 * 2 * 2 * 4 * 4 * 64, f'{reply.products} products, {reply.flops} operations for {shape}'


@pytest.mark.points(1, exercise=2)
def test_newton_schulz_zero(student):
    "A gradient of zeros has the norm 0. Add a little to the norm before you divide."
    assert close(student.newton_schulz(torch.zeros(2, 3), 3), torch.zeros(2, 3))


# 3. Polar Express
@pytest.mark.points(2, exercise=3)
def test_polar_express(student, rng):
    "Each round has its own (a, b, c), in the order given; A is made anew in every round."
    G = normal(rng, 4, 6)
    assert close(student.polar_express(G, EXPRESS), by_svd(G, EXPRESS, 1.01))


@pytest.mark.points(1, exercise=3)
def test_polar_express_one_round(student, rng):
    "b belongs to A = X X^T and c to A A; and the norm is divided out with 1.01, which one round still shows."
    G = normal(rng, 3, 3)
    for p in EXPRESS[0], (1.0, 1.0, 0.0), (0.0, 0.0, 1.0): assert close(student.polar_express(G, [p]), by_svd(G, [p], 1.01), 5e-4)


@pytest.mark.points(1, exercise=3)
def test_polar_express_tall(student, rng):
    "Tall matrices are transposed before and after; otherwise the result is right but the square is the large one, or the shape is wrong."
    reply = student.request('polar_express', (G := normal(rng, 40, 4)), EXPRESS)
    assert close(reply.value, by_svd(G, EXPRESS, 1.01)) and reply.flops <= 5 * 2 * (2 * 4 * 4 * 40 + 4 * 4 * 4), f'{reply.flops} operations'


@pytest.mark.points(1, exercise=3)
def test_polar_express_products(student, rng):
    "Three products a round: X X^T, A A, and one with X. Multiplying X by A and then by A again needs a fourth."
    reply = student.request('polar_express', (G := normal(rng, 5, 8)), EXPRESS)
    assert close(reply.value, by_svd(G, EXPRESS, 1.01)) and reply.products <= 15, f'{reply.products} products in 5 rounds'


# 4. One step of Muon
def stepped(p, g, b, lr, m, decay):
    """The reference for a step."""
    b = m * b + (1 - m) * g
    update = by_svd((1 - m) * g + m * b, EXPRESS, 1.01)
    return p * (1 - lr * decay) - lr * max(1, p.shape[0] / p.shape[1]) ** 0.5 * update, b


@pytest.mark.points(2, exercise=4)
def test_step(student, rng):
    "Downhill: the update is subtracted. It is the momentum that goes through the polynomial, not the bare gradient, and the new buffer is returned, not the polynomial's result."
    p, g, b = (normal(rng, 4, 6) for _ in range(3))
    for got, want in zip(student.muon_step(p, g, b, 0.1, 0.9), stepped(p, g, b, 0.1, 0.9, 0.0)): assert close(got, want)


@pytest.mark.points(1, exercise=4)
def test_step_tall(student, rng):
    "Tall matrices move further, by the root of rows / cols; wide ones are not slowed down."
    for shape in ((16, 4), (4, 16)):
        p, g, b = (normal(rng, *shape) for _ in range(3))
        assert close(student.muon_step(p, g, b, 0.5, 0.9)[0], stepped(p, g, b, 0.5, 0.9, 0.0)[0])


@pytest.mark.points(1, exercise=4)
def test_step_decay(student, rng):
    "Weight decay acts on the parameter, beside the update: p shrinks by lr * weight_decay of itself. Added to the gradient it would vanish in the polynomial."
    p, g, b = (normal(rng, 3, 5) for _ in range(3))
    assert close(student.muon_step(p, g, b, 0.1, 0.9, 0.4)[0], stepped(p, g, b, 0.1, 0.9, 0.4)[0])


@pytest.mark.points(1, exercise=4)
def test_steps_in_a_row(student, rng):
    "The buffer is carried from step to step, and the parameter you were given stays as it was."
    p = p2 = normal(rng, 5, 5)
    b = b2 = torch.zeros(5, 5)
    for _ in range(3):
        g = normal(rng, 5, 5)
        reply = student.request('muon_step', p, g, b, 0.1, 0.9, 0.1, after=True)
        assert close(reply.after[0], p, 0) and close(reply.after[2], b, 0)
        (p, b), (p2, b2) = reply.value, stepped(p2, g, b2, 0.1, 0.9, 0.1)
    assert close(p, p2, 5e-3) and close(b, b2)
