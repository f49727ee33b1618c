//! The network of `demo/train.py` in Rust: a small spiking convolutional network that learns handwritten digits.
//!
//! Reads digits and weights from files that `demo/train.py --save DIR` writes (`cargo xtask digits` does it, to `target/digits`). Records itself into the file that `--record` names, or to the daemon where it runs under
//! `optape record -- ...`; without either it just trains.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, bail};
use clap::Parser;
use optape_torch::Tape;
use serde_json::{Value, json};
use tch::nn::{self, ModuleT, OptimizerConfig};
use tch::{Device, Kind, Tensor};

const TIME_STEPS: i64 = 4;
const CLASSES: i64 = 10;
const CHANNELS: i64 = 32;
const HIDDEN: i64 = 128;

#[derive(Debug, Parser)]
struct Options {
    /// Where the digits and the weights are
    #[arg(long, default_value = "target/digits")]
    data: PathBuf,
    /// Record into FILE
    #[arg(long, value_name = "FILE")]
    record: Option<PathBuf>,
    /// Run one batch forward, with the weights that were written, and nothing else
    #[arg(long)]
    one_batch: bool,
    #[arg(long, default_value_t = 4)]
    epochs: i64,
    #[arg(long, default_value_t = 64)]
    batch_size: i64,
}

fn main() -> anyhow::Result<()> {
    let options = Options::parse();
    let tape = match &options.record {
        Some(path) => Some(optape_torch::record(
            path,
            optape_torch::Options::default(),
        )?),
        None if std::env::var_os("OPTAPE_RUN").is_some() => Some(optape_torch::attach()?),
        None => None,
    };
    let data = Data::read(&options.data)?;
    tch::manual_seed(0);
    let variables = nn::VarStore::new(Device::Cpu);
    let mut network = SpikingDigits::new(&variables.root());
    let result = if options.one_batch {
        one_batch(&variables, &mut network, &data, tape.as_ref())?
    } else {
        train(&variables, &mut network, &data, &options, tape.as_ref())?
    };
    println!("{result}");
    Ok(())
}

/// Leaky integrate-and-fire neurons: half of the potential leaks, those above the threshold spike and are reset. Gradients
/// pass as if the step were a sigmoid.
struct Leaky {
    potential: Option<Tensor>,
}

impl Leaky {
    const THRESHOLD: f64 = 0.5;

    fn step(&mut self, current: &Tensor) -> Tensor {
        let before = self
            .potential
            .take()
            .unwrap_or_else(|| current.zeros_like());
        let potential = (&before - &before / 2.0) + current;
        let above = &potential - Self::THRESHOLD;
        let hard = above.ge(0.0).to_kind(Kind::Float);
        let spikes = if above.requires_grad() {
            let soft = (&above * 4.0).sigmoid();
            // The difference is zero, so the sum is exactly 0 or 1; only its gradient is not.
            &hard + (&soft - soft.detach())
        } else {
            hard.shallow_clone()
        };
        self.potential = Some((1.0 - hard) * potential);
        spikes
    }
}

struct SpikingDigits {
    conv1: nn::Conv2D,
    conv2: nn::Conv2D,
    fc1: nn::Linear,
    fc2: nn::Linear,
    neurons: [Leaky; 3],
}

impl SpikingDigits {
    fn new(root: &nn::Path<'_>) -> Self {
        let same = nn::ConvConfig {
            padding: 1,
            ..nn::ConvConfig::default()
        };
        Self {
            conv1: nn::conv2d(root / "conv1", 1, CHANNELS, 3, same),
            conv2: nn::conv2d(root / "conv2", CHANNELS, 2 * CHANNELS, 3, same),
            fc1: nn::linear(
                root / "fc1",
                2 * CHANNELS * 4 * 4,
                HIDDEN,
                nn::LinearConfig::default(),
            ),
            fc2: nn::linear(root / "fc2", HIDDEN, CLASSES, nn::LinearConfig::default()),
            neurons: [
                Leaky { potential: None },
                Leaky { potential: None },
                Leaky { potential: None },
            ],
        }
    }

    /// One time step. Scopes are named as Python's modules are, so that the two recordings can be compared.
    fn step(&mut self, x: &Tensor, train: bool, tape: Option<&Tape>) -> Tensor {
        let _network = tape.map(|tape| tape.scope_t("SpikingDigits", train));
        let [lif1, lif2, lif3] = &mut self.neurons;
        let x = layer(tape, "conv1", &self.conv1, x, train);
        let x = spiking(tape, "lif1", lif1, &x);
        let x = layer(tape, "conv2", &self.conv2, &x, train);
        let x = spiking(tape, "lif2", lif2, &x);
        // `avg_pool2d_default` of tch 0.26 sums instead: it divides by 1.
        let mean = nn::func(|x| x.avg_pool2d([2, 2], [2, 2], [0, 0], false, true, None::<i64>));
        let x = layer(tape, "pool", &mean, &x, train);
        let x = layer(tape, "flatten", &nn::func(|x| x.flat_view()), &x, train);
        let x = layer(tape, "fc1", &self.fc1, &x, train);
        let x = spiking(tape, "lif3", lif3, &x);
        layer(tape, "fc2", &self.fc2, &x, train)
    }

    /// All time steps of `[time, batch, 1, 8, 8]`; the mean output, `[batch, 10]`.
    #[expect(
        clippy::assign_op_pattern,
        reason = "`+=` on tensors writes in place, which is another op"
    )]
    fn answer(&mut self, spikes: &Tensor, train: bool, tape: Option<&Tape>) -> Tensor {
        for neurons in &mut self.neurons {
            neurons.potential = None;
        }
        let mut total = self.step(&spikes.select(0, 0), train, tape);
        for step in 1..TIME_STEPS {
            total = total + self.step(&spikes.select(0, step), train, tape);
        }
        total / TIME_STEPS as f64
    }
}

fn layer(tape: Option<&Tape>, name: &str, layer: &impl ModuleT, x: &Tensor, train: bool) -> Tensor {
    let _scope = tape.map(|tape| tape.scope(name));
    layer.forward_t(x, train)
}

fn spiking(tape: Option<&Tape>, name: &str, neurons: &mut Leaky, current: &Tensor) -> Tensor {
    let _scope = tape.map(|tape| tape.scope(name));
    let spikes = neurons.step(current);
    if let Some(tape) = tape {
        tape.spikes(name, &spikes);
    }
    spikes
}

fn one_batch(
    variables: &nn::VarStore,
    network: &mut SpikingDigits,
    data: &Data,
    tape: Option<&Tape>,
) -> anyhow::Result<Value> {
    for (name, mut variable) in variables.variables() {
        let written = data.tensor(&name)?;
        tch::no_grad(|| variable.copy_(written));
    }
    let spikes = data.tensor("batch")?;
    let outputs = tch::no_grad(|| {
        let _range = tape.map(|tape| tape.range("batch"));
        network.answer(spikes, false, tape)
    });
    Ok(json!({ "images": outputs.size()[0], "sum": outputs.sum(Kind::Double).double_value(&[]) }))
}

fn train(
    variables: &nn::VarStore,
    network: &mut SpikingDigits,
    data: &Data,
    options: &Options,
    tape: Option<&Tape>,
) -> anyhow::Result<Value> {
    let (images, labels) = (data.tensor("images")?, data.tensor("labels")?);
    let all = images.size()[0];
    let test = data.test_images;
    let (train_images, train_labels) = (
        images.narrow(0, test, all - test),
        labels.narrow(0, test, all - test),
    );

    let mut optimizer = nn::Adam::default().build(variables, 2e-3)?;
    let started = Instant::now();
    for epoch in 1..=options.epochs {
        let order = Tensor::randperm(all - test, (Kind::Int64, Device::Cpu));
        let mut sum = 0.0;
        for batch in order.split(options.batch_size, 0) {
            let spikes = encode(&train_images.index_select(0, &batch));
            let labels = train_labels.index_select(0, &batch);
            let loss = network
                .answer(&spikes, true, tape)
                .cross_entropy_for_logits(&labels);
            optimizer.zero_grad();
            loss.backward();
            {
                let _stage = tape.map(|tape| tape.stage("optimizer"));
                optimizer.step();
            }
            if let Some(tape) = tape {
                tape.step(batch.size()[0].unsigned_abs());
            }
            sum += loss.double_value(&[]) * batch.size()[0] as f64;
        }
        println!(
            "epoch {epoch}/{}: loss {:.4}",
            options.epochs,
            sum / (all - test) as f64
        );
    }
    let seconds = started.elapsed().as_secs_f64();

    let right = tch::no_grad(|| {
        let _range = tape.map(|tape| tape.range("test"));
        let answer = network.answer(&encode(&images.narrow(0, 0, test)), false, tape);
        answer
            .argmax(1, false)
            .eq_tensor(&labels.narrow(0, 0, test))
            .sum(Kind::Int64)
            .int64_value(&[])
    });
    Ok(json!({
        "accuracy": right as f64 / test as f64,
        "epochs": options.epochs,
        "train_images": (all - test) * options.epochs,
        "test_images": test,
        "train_seconds": (seconds * 100.0).round() / 100.0,
    }))
}

/// Brightness to spikes: `[batch, 1, 8, 8]` in 0..1 becomes `[time, batch, 1, 8, 8]` of 0 and 1.
fn encode(images: &Tensor) -> Tensor {
    let size = [&[TIME_STEPS], images.size().as_slice()].concat();
    Tensor::rand(size, (Kind::Float, Device::Cpu))
        .lt_tensor(images)
        .to_kind(Kind::Float)
}

/// The files of `demo/train.py --save`.
struct Data {
    tensors: HashMap<String, Tensor>,
    test_images: i64,
    directory: PathBuf,
}

impl Data {
    fn read(directory: &Path) -> anyhow::Result<Self> {
        let path = directory.join("index.json");
        let text = fs::read_to_string(&path).with_context(|| {
            format!(
                "cannot read {}; `python demo/train.py --save {}` writes it",
                path.display(),
                directory.display()
            )
        })?;
        let index: HashMap<String, Value> = serde_json::from_str(&text)?;
        let mut tensors = HashMap::new();
        let mut test_images = 0;
        for (name, entry) in index {
            match entry.as_i64() {
                Some(number) => test_images = number,
                None => {
                    let tensor = read_tensor(directory, &entry)
                        .with_context(|| format!("cannot read {name}"))?;
                    tensors.insert(name, tensor);
                }
            }
        }
        Ok(Self {
            tensors,
            test_images,
            directory: directory.to_owned(),
        })
    }

    fn tensor(&self, name: &str) -> anyhow::Result<&Tensor> {
        self.tensors
            .get(name)
            .with_context(|| format!("there is no {name} in {}", self.directory.display()))
    }
}

fn read_tensor(directory: &Path, entry: &Value) -> anyhow::Result<Tensor> {
    let file = entry["file"].as_str().context("no file")?;
    let kind = match entry["dtype"].as_str() {
        Some("float32") => Kind::Float,
        Some("int64") => Kind::Int64,
        other => bail!("{other:?} is no element type of ours"),
    };
    let shape: Vec<i64> = entry["shape"]
        .as_array()
        .context("no shape")?
        .iter()
        .filter_map(Value::as_i64)
        .collect();
    Ok(Tensor::f_from_data_size(
        &fs::read(directory.join(file))?,
        &shape,
        kind,
    )?)
}
