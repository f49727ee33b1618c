"""Small programs of many kinds, for what the rules `optape` know. The argument says which.

`python coverage.py WHICH [WHICH...]`; without any, prints their names, one line each.
"""

import math
import sys

import torch
from torch import nn
from torch.nn import functional


def resnet18():
    """A training step of torchvision's ResNet-18."""
    import torchvision

    network = torchvision.models.resnet18(num_classes=10)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    step(network, torch.rand(2, 3, 64, 64), torch.tensor([1, 2]), optimizer)


def resnet18_inference():
    """Its forward in the modes that inference runs in."""
    import torchvision

    network = torchvision.models.resnet18(num_classes=10).eval()
    images = torch.rand(2, 3, 64, 64)
    with torch.inference_mode():
        network(images).softmax(1).topk(3)
    with torch.no_grad():
        network(images).argmax(1)


def step(network, inputs, targets, optimizer, **loss_options):
    optimizer.zero_grad()
    loss = functional.cross_entropy(network(inputs), targets, **loss_options)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
    optimizer.step()
    return loss.item()


class Transformer(nn.Module):
    """A small decoder: tokens and positions, masked self-attention, the next token."""

    def __init__(self, words=50, width=32, heads=4, length=12, layers=2):
        super().__init__()
        self.tokens = nn.Embedding(words, width)
        self.positions = nn.Embedding(length, width)
        layer = nn.TransformerEncoderLayer(width, heads, 64, dropout=0.1, activation="gelu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, norm=nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, words)

    def forward(self, tokens):
        length = tokens.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        x = self.tokens(tokens) + self.positions(torch.arange(length))
        return self.head(self.layers(x, mask=mask, is_causal=True))


def transformer():
    """A training step of it, with AdamW and a schedule."""
    network = Transformer()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    tokens = torch.randint(0, 50, (3, 12))
    for _ in range(2):
        optimizer.zero_grad()
        scores = network(tokens[:, :-1])
        loss = functional.cross_entropy(scores.reshape(-1, 50), tokens[:, 1:].reshape(-1), label_smoothing=0.1)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()


def transformer_generation():
    """Its inference: fast paths, greedy and sampled tokens."""
    network = Transformer().eval()
    tokens = torch.randint(0, 50, (2, 3))
    with torch.no_grad():
        for _ in range(3):
            following = network(tokens)[:, -1].argmax(-1, keepdim=True)
            tokens = torch.cat([tokens, following], 1)
    with torch.inference_mode():
        encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2).eval()
        encoder(torch.rand(2, 12, 32))
        scores = network(tokens)[:, -1]
        torch.multinomial((scores / 0.8).softmax(-1), 1)


def nested():
    """The encoder's fast path for sentences of several lengths, which packs them into nested tensors."""
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2).eval()
    padding = torch.tensor([[False] * 12, [False] * 8 + [True] * 4])
    with torch.inference_mode():
        encoder(torch.rand(2, 12, 32), src_key_padding_mask=padding)


def encoder_decoder():
    """nn.Transformer, whose decoder attends to what the encoder says."""
    network = nn.Transformer(16, 2, 1, 1, 32, batch_first=True)
    target = torch.rand(2, 5, 16)
    mask = nn.Transformer.generate_square_subsequent_mask(5)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    out = network(torch.rand(2, 7, 16), target, tgt_mask=mask)
    functional.mse_loss(out, target).backward()
    optimizer.step()


def attention():
    """Attention without the module: own masks, grouped heads, bare products."""
    q, k, v = (torch.rand(2, 4, 6, 8, requires_grad=True) for _ in range(3))
    functional.scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()
    mask = torch.ones(6, 6, dtype=torch.bool).tril()
    functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=0.1).sum().backward()
    scores = (q @ k.transpose(-2, -1) / math.sqrt(8)).masked_fill(~mask, float("-inf"))
    (scores.softmax(-1) @ v).sum().backward()
    module = nn.MultiheadAttention(8, 2, batch_first=True)
    module(q[0], k[0], v[0], need_weights=True)[0].sum().backward()


def spiking():
    """A spiking network of SpikingJelly, multi-step, with backpropagation through time."""
    from spikingjelly.activation_based import functional as spikes
    from spikingjelly.activation_based import layer, neuron, surrogate

    network = nn.Sequential(
        layer.Conv2d(1, 4, 3, padding=1, bias=False),
        layer.BatchNorm2d(4),
        neuron.LIFNode(surrogate_function=surrogate.ATan()),
        layer.MaxPool2d(2),
        layer.Flatten(),
        layer.Linear(64, 10),
        neuron.ParametricLIFNode(surrogate_function=surrogate.Sigmoid()),
    )
    spikes.set_step_mode(network, "m")
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        out = network(torch.rand(4, 2, 1, 8, 8)).mean(0)
        functional.mse_loss(out, functional.one_hot(torch.tensor([1, 2]), 10).float()).backward()
        optimizer.step()
        spikes.reset_net(network)


def spiking_single_step():
    """The same time step by time step, with other neurons."""
    from spikingjelly.activation_based import functional as spikes
    from spikingjelly.activation_based import layer, neuron

    network = nn.Sequential(
        nn.Linear(8, 8), neuron.IFNode(), nn.Linear(8, 8), neuron.QIFNode(), nn.Linear(8, 8), neuron.EIFNode(), nn.Linear(8, 4),
        neuron.IzhikevichNode(), layer.Dropout(0.2),
    )
    out = sum(network(torch.rand(2, 8)) for _ in range(3))
    out.sum().backward()
    spikes.reset_net(network)


def other_spiking_libraries():
    """snnTorch, Norse and sinabs."""
    import norse.torch as norse
    import sinabs.layers
    import snntorch

    leaky, synaptic = snntorch.Leaky(beta=0.9, learn_beta=True), snntorch.Synaptic(alpha=0.8, beta=0.9)
    linear = nn.Linear(6, 6)
    memory = leaky.init_leaky()
    current, potential = synaptic.init_synaptic()
    total = torch.zeros(2, 6)
    for _ in range(3):
        spikes, memory = leaky(linear(torch.rand(2, 6)), memory)
        spikes, current, potential = synaptic(spikes, current, potential)
        total = total + spikes
    total.sum().backward()
    cell = norse.LIFCell()
    state = None
    for _ in range(3):
        out, state = cell(linear(torch.rand(2, 6)), state)
    out.sum().backward()
    iaf, lif = sinabs.layers.IAF(), sinabs.layers.LIF(tau_mem=20.0)
    lif(iaf(linear(torch.rand(2, 4, 6)))).sum().backward()


def sew_resnet():
    """A training step of a deep residual spiking network, over time."""
    from spikingjelly.activation_based import functional as spikes
    from spikingjelly.activation_based import neuron, surrogate
    from spikingjelly.activation_based.model import sew_resnet

    network = sew_resnet.sew_resnet18(
        cnf="ADD", spiking_neuron=neuron.IFNode, surrogate_function=surrogate.ATan(), detach_reset=True, num_classes=10
    )
    spikes.set_step_mode(network, "m")
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    images = torch.rand(2, 3, 32, 32).unsqueeze(0).repeat(2, 1, 1, 1, 1)
    functional.cross_entropy(network(images).mean(0), torch.tensor([1, 2])).backward()
    optimizer.step()
    spikes.reset_net(network)


def spiking_transformer():
    """Attention whose queries, keys and values are spikes."""
    from spikingjelly.activation_based import functional as spikes
    from spikingjelly.activation_based import layer, neuron

    class Attention(nn.Module):
        def __init__(self, width=16, heads=2):
            super().__init__()
            self.heads = heads
            self.parts = nn.ModuleList(
                nn.Sequential(layer.Conv1d(width, width, 1, bias=False), layer.BatchNorm1d(width), neuron.LIFNode()) for _ in range(3)
            )
            self.out = nn.Sequential(neuron.LIFNode(v_threshold=0.5), layer.Conv1d(width, width, 1), layer.BatchNorm1d(width))

        def forward(self, x):
            steps, batch, width, tokens = x.shape
            q, k, v = (
                part(x).transpose(-1, -2).reshape(steps, batch, tokens, self.heads, width // self.heads).permute(0, 1, 3, 2, 4)
                for part in self.parts
            )
            mixed = (q @ k.transpose(-2, -1)) @ v * 0.125
            return self.out(mixed.transpose(3, 4).reshape(steps, batch, width, tokens).contiguous())

    network = Attention()
    spikes.set_step_mode(network, "m")
    x = torch.rand(3, 2, 16, 9)
    (x + network(x)).mean().backward()
    spikes.reset_net(network)
    with torch.no_grad():
        network.eval()(x)


def online_learning():
    """Updates at every time step, without backpropagation through time."""
    from spikingjelly.activation_based import functional as spikes
    from spikingjelly.activation_based import layer, learning, neuron

    network = layer.OTTTSequential(nn.Linear(8, 8), neuron.OTTTLIFNode(), nn.Linear(8, 4))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        functional.mse_loss(network(torch.rand(2, 8)), torch.rand(2, 4)).backward()
        optimizer.step()
    spikes.reset_net(network)
    weighted, fires = nn.Linear(8, 4, bias=False), neuron.IFNode()
    learner = learning.STDPLearner("s", weighted, fires, 2.0, 2.0)
    with torch.no_grad():
        for _ in range(3):
            fires(weighted((torch.rand(1, 8) > 0.5).float()))
            weighted.weight.data += learner.step(on_grad=False)


def convolutions():
    """1, 2 and 3 dimensions, transposed, grouped, dilated, padded in all ways; poolings; resampling."""
    x1, x2, x3 = torch.rand(2, 4, 16), torch.rand(2, 4, 12, 12), torch.rand(2, 4, 6, 6, 6)
    for module, x in [
        (nn.Conv1d(4, 6, 3, padding="same"), x1),
        (nn.ConvTranspose1d(4, 6, 3, stride=2), x1),
        (nn.Conv2d(4, 8, 3, groups=4, dilation=2, padding=2, padding_mode="circular"), x2),
        (nn.Conv2d(4, 8, 3, padding=1, padding_mode="reflect"), x2),
        (nn.Conv2d(4, 8, 3, padding=1, padding_mode="replicate"), x2),
        (nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1), x2),
        (nn.Conv3d(4, 4, 3, padding=1), x3),
        (nn.ConvTranspose3d(4, 4, 2), x3),
        (nn.MaxPool1d(2), x1),
        (nn.MaxPool2d(3, 2, 1), x2),
        (nn.MaxPool3d(2), x3),
        (nn.AvgPool1d(2), x1),
        (nn.AvgPool2d(2), x2),
        (nn.AvgPool3d(2), x3),
        (nn.AdaptiveAvgPool1d(4), x1),
        (nn.AdaptiveAvgPool2d(5), x2),
        (nn.AdaptiveAvgPool3d(2), x3),
        (nn.AdaptiveMaxPool1d(4), x1),
        (nn.AdaptiveMaxPool2d(5), x2),
        (nn.LPPool2d(2, 2), x2),
        (nn.Upsample(scale_factor=2), x2),
        (nn.Upsample(scale_factor=2, mode="bilinear"), x2),
        (nn.Upsample(scale_factor=2, mode="bicubic"), x2),
        (nn.Upsample(scale_factor=2, mode="linear"), x1),
        (nn.Upsample(scale_factor=2, mode="trilinear"), x3),
        (nn.PixelShuffle(2), x2),
        (nn.ZeroPad2d(1), x2),
        (nn.Unfold(3), x2),
        (nn.LocalResponseNorm(2), x2),
    ]:
        x = x.clone().requires_grad_()
        module(x).sum().backward()
        with torch.inference_mode():
            module(x)


def norms_and_activations():
    """What stands between layers, forward and backward."""
    x = torch.rand(3, 8, 4, 4)
    modules = [
        nn.BatchNorm2d(8), nn.GroupNorm(2, 8), nn.LayerNorm([8, 4, 4]), nn.InstanceNorm2d(8, affine=True), nn.RMSNorm([4]),
        nn.ReLU(), nn.ReLU6(), nn.LeakyReLU(), nn.PReLU(), nn.ELU(), nn.SELU(), nn.CELU(), nn.GELU(), nn.GELU("tanh"), nn.SiLU(),
        nn.Mish(), nn.Sigmoid(), nn.Tanh(), nn.Softplus(), nn.Softsign(), nn.Hardtanh(), nn.Hardsigmoid(), nn.Hardswish(),
        nn.LogSigmoid(), nn.Softmax(1), nn.LogSoftmax(1), nn.Softmin(1), nn.GLU(1), nn.Threshold(0.1, 0.0), nn.Tanhshrink(), nn.Hardshrink(),
        nn.Softshrink(), nn.RReLU(), nn.Dropout(0.1), nn.Dropout2d(0.1), nn.AlphaDropout(0.1),
    ]
    for module in modules:
        inputs = x.clone().requires_grad_()
        module(inputs).sum().backward()
        module.eval()
        with torch.inference_mode():
            module(x)
    for inplace in [nn.ReLU(inplace=True), nn.SiLU(inplace=True), nn.Hardswish(inplace=True), nn.LeakyReLU(inplace=True)]:
        (inputs := x.clone().requires_grad_())
        inplace(inputs * 1).sum().backward()


def losses():
    """Loss functions, in all reductions."""
    x, y = torch.rand(4, 5, requires_grad=True), torch.rand(4, 5)
    labels = torch.tensor([0, 1, 2, 3])
    for reduction in ("mean", "sum", "none"):
        options = {"reduction": reduction}
        for loss in [
            functional.mse_loss(x, y, **options),
            functional.l1_loss(x, y, **options),
            functional.smooth_l1_loss(x, y, **options),
            functional.huber_loss(x, y, **options),
            functional.binary_cross_entropy(x, y, **options),
            functional.binary_cross_entropy_with_logits(x, y, **options),
            functional.cross_entropy(x, labels, **options),
            functional.cross_entropy(x, y.softmax(1), **options),
            functional.nll_loss(x.log_softmax(1), labels, **options),
            functional.kl_div(x.log_softmax(1), y.softmax(1), **options),
            functional.poisson_nll_loss(x, y, **options),
            functional.gaussian_nll_loss(x, y, torch.rand(4, 5) + 0.1, **options),
            functional.hinge_embedding_loss(x, torch.sign(y - 0.5), **options),
            functional.margin_ranking_loss(x[:, 0], x[:, 1], torch.ones(4), **options),
            functional.cosine_embedding_loss(x, y, torch.ones(4), **options),
            functional.triplet_margin_loss(x, y, y.flip(0), **options),
            functional.multi_margin_loss(x, labels, **options),
            functional.multilabel_margin_loss(x, torch.zeros(4, 5, dtype=torch.long), **options),
            functional.multilabel_soft_margin_loss(x, (y > 0.5).float(), **options),
            functional.soft_margin_loss(x, torch.sign(y - 0.5), **options),
        ]:
            loss.sum().backward(retain_graph=True)
    scores = torch.rand(6, 2, 5).log_softmax(2).requires_grad_()
    functional.ctc_loss(scores, torch.tensor([[1, 2], [3, 4]]), torch.tensor([6, 6]), torch.tensor([2, 2])).backward()
    x = x.detach()
    with torch.inference_mode():
        functional.mse_loss(x, y)
        functional.l1_loss(x, y)
        functional.smooth_l1_loss(x, y)
        functional.huber_loss(x, y)
        functional.binary_cross_entropy(x, y)
        functional.binary_cross_entropy_with_logits(x, y)
        functional.cross_entropy(x, labels)
        functional.nll_loss(x.log_softmax(1), labels)
        functional.kl_div(x.log_softmax(1), y.softmax(1), reduction="batchmean")
        functional.poisson_nll_loss(x, y)
        functional.hinge_embedding_loss(x, torch.sign(y - 0.5))
        functional.margin_ranking_loss(x[:, 0], x[:, 1], torch.ones(4))
        functional.cosine_embedding_loss(x, y, torch.ones(4))
        functional.triplet_margin_loss(x, y, y.flip(0))
        functional.multi_margin_loss(x, labels)
        functional.multilabel_margin_loss(x, torch.zeros(4, 5, dtype=torch.long))
        functional.multilabel_soft_margin_loss(x, (y > 0.5).float())
        functional.soft_margin_loss(x, torch.sign(y - 0.5))
        functional.ctc_loss(scores.detach(), torch.tensor([[1, 2], [3, 4]]), torch.tensor([6, 6]), torch.tensor([2, 2]))


def optimizers():
    """Every optimizer of torch, in loops over parameters, over lists, and fused."""
    for make in [
        lambda p, **o: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1, **o),
        lambda p, **o: torch.optim.Adam(p, amsgrad=True, **o),
        lambda p, **o: torch.optim.AdamW(p, **o),
        lambda p, **o: torch.optim.Adagrad(p, **o),
        lambda p, **o: torch.optim.NAdam(p, **o),
        lambda p, **o: torch.optim.RAdam(p, **o),
        lambda p, **o: torch.optim.Adamax(p, **o),
        lambda p, **o: torch.optim.Adadelta(p, **o),
        lambda p, **o: torch.optim.RMSprop(p, momentum=0.5, centered=True, **o),
        lambda p, **o: torch.optim.Rprop(p, **o),
        lambda p, **o: torch.optim.ASGD(p, **o),
    ]:
        for foreach in (False, True):
            optimize(make, foreach=foreach)
    for fused in [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad]:
        optimize(fused, fused=True)
    optimize(lambda p: torch.optim.SGD(p, lr=torch.tensor(0.1), maximize=True))
    network = nn.Linear(4, 4)
    lbfgs = torch.optim.LBFGS(network.parameters(), max_iter=3)
    inputs = torch.rand(2, 4)

    def closure():
        lbfgs.zero_grad()
        loss = network(inputs).square().sum()
        loss.backward()
        return loss

    lbfgs.step(closure)


def optimize(make, **options):
    network = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    optimizer = make(network.parameters(), **options)
    for _ in range(2):
        optimizer.zero_grad(set_to_none=False)
        network(torch.rand(2, 4)).square().sum().backward()
        optimizer.step()


def mixed_precision():
    """bfloat16 and float16, autocast, gradient scaling, weight averaging, gradient checkpointing."""
    from torch.utils.checkpoint import checkpoint

    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu")
    images, labels = torch.rand(2, 3, 8, 8), torch.tensor([0, 1])
    for _ in range(2):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = functional.cross_entropy(checkpoint(network, images, use_reentrant=False), labels)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    average = torch.optim.swa_utils.AveragedModel(network, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    average.update_parameters(network)
    average.update_parameters(network)
    with torch.no_grad():
        network.half()(images.half())


def recurrent():
    """RNN, GRU, LSTM and their cells."""
    x = torch.rand(5, 2, 4)
    for module in [nn.RNN(4, 6), nn.GRU(4, 6, num_layers=2, dropout=0.1), nn.LSTM(4, 6, bidirectional=True)]:
        module(x)[0].sum().backward()
        with torch.inference_mode():
            module(x)
    nn.LSTMCell(4, 6)(x[0])[0].sum().backward()
    nn.GRUCell(4, 6)(x[0]).sum().backward()
    nn.RNN(4, 6, nonlinearity="relu")(x)[0].sum().backward()
    with torch.inference_mode():
        nn.RNN(4, 6, nonlinearity="relu")(x)
        for cell in [nn.LSTMCell(4, 6), nn.GRUCell(4, 6), nn.RNNCell(4, 6), nn.RNNCell(4, 6, nonlinearity="relu")]:
            cell(x[0])
    packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([5, 3]))
    out, _ = nn.LSTM(4, 6)(packed)
    nn.utils.rnn.pad_packed_sequence(out)[0].sum().backward()
    with torch.inference_mode():
        packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([5, 3]))
        for module in [nn.RNN(4, 6), nn.GRU(4, 6), nn.LSTM(4, 6)]:
            nn.utils.rnn.pad_packed_sequence(module(packed)[0])


def data_and_metrics():
    """What stands around networks: preparing, indexing, counting."""
    images = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    x = images.float().div(255).sub(0.5).div_(0.25)
    x = torch.where(x > 0, x, torch.zeros_like(x)).clamp_(0, 1)
    x[:, 0, 0] = 1.0
    x[x > 0.9] = 0.0
    labels = torch.tensor([0, 1, 1, 2])
    one_hot = functional.one_hot(labels, 3).float()
    one_hot.scatter_(1, labels[:, None], 0.5)
    predicted = torch.rand(4, 3)
    (predicted.argmax(1) == labels).float().mean().item()
    predicted.topk(2).indices.eq(labels[:, None]).any(1).sum().item()
    torch.bincount(labels, minlength=3).tolist()
    torch.zeros(3, 3).index_put_((labels, predicted.argmax(1)), torch.ones(4), accumulate=True)
    torch.zeros(3).index_add_(0, labels, torch.ones(4)).cumsum(0)
    torch.zeros(3).scatter_add_(0, labels, torch.ones(4))
    torch.stack([x, x]).std(0, unbiased=False).norm()
    torch.cat([x.flatten(1), x.flatten(1)]).var(1).sqrt().max()
    x.sort(dim=-1).values.median().item()
    torch.einsum("bchw,bdhw->bcd", x, x).diagonal(dim1=1, dim2=2).sum(-1)
    torch.linspace(0, 1, 5).outer(torch.arange(4.0)).tril().triu(-1)
    torch.randperm(10)[:4].unique().numel()
    torch.poisson(x.relu()).bernoulli_(0.5)
    torch.histc(x, 8, 0, 1)
    torch.meshgrid(torch.arange(3), torch.arange(4), indexing="ij")[0].reshape(-1).repeat(2).roll(1)
    torch.isnan(x).logical_not().all().item()
    functional.normalize(predicted, dim=1).mm(predicted.t()).fill_diagonal_(0).amax(1)
    functional.cosine_similarity(predicted, predicted.flip(0))
    torch.cdist(predicted, predicted).argsort(1)
    functional.pad(x, (1, 1, 1, 1), mode="reflect").roll(1, 2).flip(3).repeat_interleave(2, 0)
    functional.embedding_bag(labels, torch.rand(5, 4), torch.tensor([0, 2]), mode="mean")
    functional.grid_sample(x, torch.rand(4, 5, 5, 2) * 2 - 1, align_corners=False)
    torch.fft.rfft(x).abs().square().log1p()
    torch.rand(3, 4, 4).logsumexp((1, 2)).exp().round().long().bitwise_and(1)


def empty():
    """Nothing in it."""
    network = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    network(torch.rand(0, 4)).sum().backward()
    torch.cat([torch.rand(0, 2), torch.rand(2, 2)]).sum()
    nn.Conv2d(1, 2, 3)(torch.rand(0, 1, 5, 5)).sum().backward()


PROGRAMS = {
    name: value
    for name, value in list(globals().items())
    if callable(value) and getattr(value, "__module__", None) == "__main__" and not isinstance(value, type)
}
for helper in ("step", "optimize"):
    del PROGRAMS[helper]

if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    if len(sys.argv) == 1:
        print("\n".join(PROGRAMS))
    for name in sys.argv[1:]:
        PROGRAMS[name]()
