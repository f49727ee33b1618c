//! Overloads that write to `out`, and composite ops that inference mode shows whole, count like what they are.

use optape_tests::Bench;
use serde_json::Value;

#[test]
fn out_overloads_and_einsum_count_like_what_they_are() {
    let Some(bench) = Bench::new() else { return };
    let words = bench.words(&Bench::program("overloads.py"), &[]);
    let done = bench.run(&mut bench.record("t.optape", &words));
    done.expect_code(0);
    let report = done.report();
    let nonzeros = |name: &str| report[name].as_u64();
    let (spikes, inputs) = (nonzeros("spikes"), nonzeros("inputs"));
    assert!(spikes.is_some_and(|n| n > 0) && inputs.is_some_and(|n| n > 0));
    let replay = bench.replay("t.optape", &[]);
    let count = |counter: &str, op: &str| {
        let ops: &Value = &replay["counters"][counter]["scopes"]["Global"];
        ops[op].as_u64()
    };
    let times = |n: Option<u64>, factor: u64| n.map(|n| n * factor);
    // Each spike meets a row of six weights.
    assert_eq!(count("synop", "aten.mm.out"), times(spikes, 6));
    assert_eq!(count("synop", "aten.addmm.out"), times(spikes, 6));
    assert_eq!(count("flop", "aten.mm.out"), Some(2 * 4 * 5 * 6));
    assert_eq!(count("flop", "aten.addmm.out"), Some(2 * 4 * 5 * 6 + 24));
    // Adding spikes to spikes costs an addition per spike, adding anything else one per element.
    assert_eq!(count("ac", "aten.add.out"), times(spikes, 2));
    assert_eq!(count("ac", "aten.sub.out"), Some(30));
    // Two of them, from either side.
    assert_eq!(count("synop", "aten.einsum.default"), times(inputs, 2 * 2));
    assert_eq!(count("flop", "aten.einsum.default"), Some(2 * 2 * 24));
    for counter in ["flop", "memory_access", "mac", "ac", "synop"] {
        assert_eq!(
            replay["coverage"]["counters"][counter]["unknown"], 0,
            "{counter}: {}",
            replay["coverage"]
        );
    }
}
