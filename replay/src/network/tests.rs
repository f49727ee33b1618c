//! Layer graphs of a made-up network: a convolution with a batch norm, a rectifier, an addition around them, and a linear layer that is called
//! twice.

use optape_trace::{Argument, ModuleId, ScopeId};

use super::graph::{Kind, LayerGraph, Leaves};
use super::*;
use crate::energy::Figure;
use crate::rules::RuleSet;
use crate::testing::{Call, Statistic, Tape, schema, tensor};
use crate::{Request, Traces, Wanted, evaluate, graph as graph_of};

const CONV: &str = "torch.nn.modules.conv.Conv2d";
const NORM: &str = "torch.nn.modules.batchnorm.BatchNorm2d";
const RELU: &str = "torch.nn.modules.activation.ReLU";
const LINEAR: &str = "torch.nn.modules.linear.Linear";

/// `training`: the batch norm's flag. `branches`: something else takes what the convolution gives.
fn residual(training: bool, branches: bool) -> Tape {
    let mut tape = Tape::full();
    let (net, root) = tape.module(ScopeId::GLOBAL, "Net", "app.Net", false);
    let (conv, conv_scope) = tape.module(root, "Net.conv", CONV, false);
    let (norm, norm_scope) = tape.module(root, "Net.norm", NORM, false);
    let (act, act_scope) = tape.module(root, "Net.act", RELU, false);
    let (fc, fc_scope) = tape.module(root, "Net.fc", LINEAR, false);
    tape.fact(
        net,
        "children",
        r#"[["conv",1],["norm",2],["act",3],["fc",4],["again",4]]"#,
    );
    tape.fact(net, "attributes", r#"{"input_shape":[8,8,2]}"#);
    tape.fact(
        conv,
        "attributes",
        r#"{"kernel_size":[3,3],"stride":[1,1],"padding":[1,1],"dilation":[1,1],"groups":1,"in_channels":2,"out_channels":2}"#,
    );
    tape.fact(
        conv,
        "parameters",
        r#"[{"name":"weight","dtype":"float32","shape":[2,2,3,3],"requires_grad":true}]"#,
    );
    tape.fact(norm, "attributes", r#"{"track_running_stats":true}"#);
    tape.fact(norm, "training", if training { "true" } else { "false" });
    tape.fact(fc, "attributes", r#"{"in_features":128,"out_features":128}"#);
    tape.fact(
        fc,
        "parameters",
        r#"[{"name":"weight","dtype":"float32","shape":[128,128],"requires_grad":true},
            {"name":"bias","dtype":"float32","shape":[128],"requires_grad":true}]"#,
    );
    let image = tensor(&[1, 2, 8, 8]);
    let flat = tensor(&[1, 128]);
    let one = |schema, into: &optape_trace::TensorMeta, out: &optape_trace::TensorMeta| {
        Call::new(
            schema,
            vec![Argument::Tensor(0)],
            vec![into.clone()],
            vec![out.clone()],
        )
    };
    let convolution = Call::new(
        schema::CONVOLUTION,
        vec![
            Argument::Tensor(0),
            Argument::Tensor(1),
            Argument::None,
            Argument::IntList(vec![1, 1]),
            Argument::IntList(vec![1, 1]),
            Argument::IntList(vec![1, 1]),
            Argument::Bool(false),
            Argument::IntList(vec![0, 0]),
            Argument::Int(1),
        ],
        vec![image.clone(), tensor(&[2, 2, 3, 3])],
        vec![image.clone()],
    )
    .with(vec![Statistic::spikes(0, 16)]);
    let addition = Call::new(
        schema::ADD,
        vec![Argument::Tensor(0), Argument::Tensor(1), Argument::Int(1)],
        vec![image.clone(), image.clone()],
        vec![image.clone()],
    );
    let linear = Call::new(
        schema::ADDMM,
        vec![
            Argument::Tensor(0),
            Argument::Tensor(1),
            Argument::Tensor(2),
            Argument::Int(1),
            Argument::Int(1),
        ],
        vec![tensor(&[128]), flat.clone(), tensor(&[128, 128])],
        vec![flat.clone()],
    );
    tape.enter_with(0, net, &[10]);
    tape.enter_with(1, conv, &[10]);
    tape.call_on(conv_scope, &convolution, &[10, 1, 11]);
    tape.exit_with(1, conv, &[11]);
    tape.enter_with(2, norm, &[11]);
    tape.call_on(norm_scope, &one(schema::BATCH_NORM, &image, &image), &[11, 12]);
    tape.exit_with(2, norm, &[12]);
    tape.enter_with(3, act, &[12]);
    tape.call_on(act_scope, &one(schema::RELU, &image, &image), &[12, 13]);
    tape.exit_with(3, act, &[13]);
    let other = if branches { 11 } else { 10 };
    tape.call_on(root, &addition, &[13, other, 14]);
    // What nothing needs is no node.
    tape.call_on(root, &one(schema::RELU, &image, &image), &[14, 20]);
    tape.call_on(
        root,
        &Call::new(
            schema::VIEW,
            vec![Argument::Tensor(0), Argument::IntList(vec![1, -1])],
            vec![image.clone()],
            vec![flat.clone()],
        ),
        &[14, 15],
    );
    for (call, from, to) in [(4, 15, 16), (5, 16, 17)] {
        tape.enter_with(call, fc, &[from]);
        tape.call_on(fc_scope, &linear, &[2, from, 3, to]);
        tape.exit_with(call, fc, &[to]);
    }
    tape.exit_with(0, net, &[17]);
    tape
}

fn network(tape: Tape) -> Network {
    let traces = Traces::of("network", tape.trace());
    let request = Request::default();
    let timelines = traces.timelines(false, &[]).unwrap();
    let rules = RuleSet::named("optape").unwrap();
    let mut extras = [crate::evaluate::Extra::modules()];
    crate::evaluate::follow(&traces, &rules, &request, &timelines, &[], &[], &mut extras).unwrap();
    extras[0].followed.networks().next().unwrap().clone()
}

/// `node <- inputs` of each node.
fn edges(graph: &LayerGraph) -> Vec<String> {
    let name = |at: &usize| graph.nodes[*at].name.clone();
    graph
        .nodes
        .iter()
        .map(|node| {
            let inputs: Vec<String> = node.inputs.iter().map(name).collect();
            format!("{} <- {}", node.name, inputs.join(", "))
        })
        .collect()
}

#[test]
fn edges_follow_tensors() {
    let network = network(residual(false, false));
    let root = network.root().unwrap();
    let graph = LayerGraph::of(&network, root, Leaves::Innermost).unwrap();
    assert_eq!(
        edges(&graph),
        [
            "input0 <- ",
            "conv <- input0",
            "norm <- conv",
            "act <- norm",
            "add <- act, input0",
            "flatten <- add",
            "fc <- flatten",
            "fc_1 <- fc",
            "output <- fc_1",
        ]
    );
    assert_eq!(graph.nodes[1].kind, Kind::Layer(ModuleId(1)));
    let folded = graph.folded();
    assert_eq!(
        edges(&folded)[6..],
        ["fc <- flatten, fc", "output <- fc"],
        "a layer that feeds itself"
    );
    assert_eq!(folded.nodes[6].calls, 2);
    assert_eq!(
        edges(&LayerGraph::of(&network, root, Leaves::Traced).unwrap()),
        edges(&graph)
    );
}

#[test]
fn a_batch_norm_becomes_part_of_the_convolution() {
    let fused = |training, branches| {
        let network = network(residual(training, branches));
        let root = network.root().unwrap();
        let mut graph = LayerGraph::of(&network, root, Leaves::Innermost).unwrap();
        let count = graph.fuse_batch_norm(&network);
        (count, edges(&graph), graph)
    };
    let (count, edges, graph) = fused(false, false);
    assert_eq!(count, 1);
    assert_eq!(
        edges[..4],
        ["input0 <- ", "conv <- input0", "act <- conv", "add <- act, input0"]
    );
    assert_eq!(graph.nodes[1].fused, Some(ModuleId(2)));
    assert_eq!(fused(true, false).0, 0, "in training its statistics are the batch's");
    assert_eq!(fused(false, true).0, 0, "somebody else takes the convolution's output");
}

#[test]
fn what_a_convolution_was_given_weighs_by_its_fan_out() {
    let network = network(residual(false, false));
    let conv = network.calls(ModuleId(1)).unwrap();
    assert_eq!(conv.count(), 1);
    let last = conv.last.as_ref().unwrap();
    assert_eq!(last.input[0].nonzeros, Some(16));
    assert_eq!(last.input[0].sum, Some(16.0), "spikes are ones");
    assert_eq!(last.fan_out_sum, None, "this recording has no fan-out");
    let paths: Vec<&str> = network.tree(ModuleId(0)).iter().map(|(path, _)| path.as_str()).collect();
    assert_eq!(paths, ["", "conv", "norm", "act", "fc"], "each once, by its first name");
}

#[test]
fn a_graph_reads_as_text_and_as_a_drawing() {
    let traces = Traces::of("network", residual(false, false).trace());
    let report = graph_of(
        &traces,
        &crate::Selection::default(),
        GraphOptions {
            fuse_batch_norm: true,
            ..GraphOptions::default()
        },
    )
    .unwrap();
    let (mut text, mut dot) = (Vec::new(), Vec::new());
    report.write_text(&mut text).unwrap();
    report.write_dot(&mut dot).unwrap();
    insta::assert_snapshot!(String::from_utf8(text).unwrap());
    insta::assert_snapshot!(String::from_utf8(dot).unwrap());
}

/// Without spikes: the formulas of the paper for a convolution, an addition and two calls of a linear layer.
#[test]
fn qualia_of_a_network_without_spikes() {
    let traces = Traces::of("network", residual(false, false).trace());
    let request = |names: &[&str]| Request {
        counters: Wanted::Named(Vec::new()),
        energy: Wanted::Named(Vec::new()),
        qualia: Wanted::Named(names.iter().map(|name| (*name).to_owned()).collect()),
        ..Request::default()
    };
    let rules = RuleSet::named("optape").unwrap();
    let report = evaluate(&traces, &rules, &request(&["mem32", "operations"])).unwrap();
    let section = report.qualia.unwrap();
    let rows = |part: &str, name: &str| match section.reports.get(part).unwrap().get(name) {
        Some(Figure::List(rows)) => rows.clone(),
        other => panic!("{other:?}"),
    };
    let row = |rows: &[Figure], name: &str| {
        let named = rows.iter().find(|row| row.get("name") == Some(&Figure::from(name)));
        named.unwrap_or_else(|| panic!("no {name}")).clone()
    };
    let number = |row: &Figure, key: &str| match row.get(key) {
        Some(Figure::Float(value)) => *value,
        other => panic!("{key}: {other:?}"),
    };
    let operations = rows("operations", "default");
    let names: Vec<String> = operations
        .iter()
        .map(|row| row.get("name").unwrap().to_string())
        .collect();
    assert_eq!(names, ["conv", "add", "flatten", "fc", "fc_1", "Total"]);
    let conv = row(&operations, "conv");
    let products = 2.0 * 128.0 * 9.0;
    assert_eq!(number(&conv, "syn_mac"), products);
    assert_eq!(number(&conv, "syn_acc"), 128.0);
    assert_eq!(number(&conv, "addr_acc"), 128.0 + 128.0 + 2.0 * 9.0);
    // The bias that it does not have is read all the same.
    assert_eq!(number(&conv, "mem_read"), products + products + 128.0);
    assert_eq!(conv.get("input_spikerate"), Some(&Figure::None));
    // Sizes of 8, 8 and 2 are added up where their product is meant.
    let add = row(&operations, "add");
    assert_eq!(number(&add, "syn_acc"), 18.0);
    assert_eq!(number(&add, "mem_read"), 36.0);
    assert_eq!(number(&add, "mem_write"), 2.0);
    let total = row(&operations, "Total");
    assert_eq!(number(&total, "syn_mac"), products + 2.0 * 128.0 * 128.0);

    let energy = rows("energy", "mem32");
    let ram = |elements: f64| 1.09e-5 * elements * 32.0 + 13.2;
    let fc = row(&energy, "fc");
    let close = |found: f64, wanted: f64| assert!((found / wanted - 1.0).abs() < 1e-12, "{found} {wanted}");
    close(number(&fc, "mem_weights"), 128.0 * 128.0 * ram(128.0 * 128.0));
    close(number(&fc, "mem_bias"), 128.0 * ram(128.0));
    close(number(&fc, "mem_io"), 256.0 * ram(128.0));
    close(number(&fc, "ops"), 128.0 * 128.0 * 3.2 + 128.0 * 0.1);
    let conv = row(&energy, "conv");
    assert_eq!(number(&conv, "mem_bias"), 0.0, "it has none");
    let about = section.about.get("energy/mem32").unwrap();
    assert_eq!((about.rules, about.counted), ("qualia-2.6.0", 5));
    assert_eq!(about.model, "Net");
}
