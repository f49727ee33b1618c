//! Files of rules: what they count, and what is wrong with them.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::energy::Assignment;
use crate::testing::spiking_tape;
use crate::{Report, Request, Traces, Wanted, evaluate, explain};

fn load(text: &str) -> Result<RuleSet, ReplayError> {
    let mut chain = Vec::new();
    parse(text, "my.toml", Path::new("my.toml"), PathBuf::from("/my.toml"), &mut chain)
}

fn message(text: &str) -> String {
    load(text).unwrap_err().to_string()
}

fn named(counters: &[&str]) -> Request {
    Request {
        counters: Wanted::Named(counters.iter().map(|name| (*name).to_owned()).collect()),
        energy: Wanted::Named(Vec::new()),
        ..Request::default()
    }
}

fn replay(rules: &RuleSet, request: &Request) -> Result<Report, ReplayError> {
    evaluate(&Traces::of("small", spiking_tape().trace()), rules, request)
}

const SPIKES: &str = r#"
name = "lab"
version = 3
description = "Spikes into layers"

[define]
calls_of_layers = "1"

[counters.spikes]
unit = "spike"

[counters.spikes.rules."aten::addmm"]
formula = "if(binary(mat1), nonzeros(mat1) + 2 * (calls_of_layers - 1), 0)"
source = "the test"
tests = [
  { given = { mat1 = "float32[2, 3]" }, statistics = { "binary(mat1)" = true, "nonzeros(mat1)" = 5 }, expect = 5 },
  { given = { mat1 = "float32[2, 3]" }, statistics = { "binary(mat1)" = false }, expect = 0 },
]

[counters.spikes.rules."aten::add.Tensor"]
zero = "no layer"
source = "the test"
"#;

#[test]
fn a_counter_of_ones_own_counts_by_formula() {
    let rules = load(SPIKES).unwrap();
    assert_eq!((rules.name.as_ref(), rules.version), ("lab", 3));
    assert_eq!(rules.description, "Spikes into layers (my.toml)");
    let report = replay(&rules, &named(&["spikes"])).unwrap();
    let counter = report.counters.get("spikes").unwrap();
    // Three and four spikes, each time in the second of two time steps.
    assert_eq!((counter.total, counter.unit.as_str()), (7, "spike"));
    assert_eq!(counter.scopes["Net.fc"]["aten.addmm.default"], 7);
    let coverage = report.coverage.counters.get("spikes").unwrap();
    assert_eq!((coverage.counted, coverage.zero_by_rule), (4, 4));
    assert!(coverage.unknown > 0);
}

/// What the documentation shows is read.
#[test]
fn examples_of_the_documentation_hold() {
    let page = include_str!("../../../../docs/sweeps.md");
    let start = page.find("name = \"lab\"").unwrap();
    let block = &page[start..];
    let block = &block[..block.find("```").unwrap()];
    // `like` needs a set that has the counter.
    let rules = load(&block.replace("\"optape\"", "\"spikingjelly-2026-06\"")).unwrap();
    assert_eq!(rules.counter("small_memory").unwrap().settings()["sram_kib"], 16.0);
    assert!(message(block).contains("there is no counter 'memory_residency'"));
    let module = include_str!("mod.rs");
    let example: String = module
        .lines()
        .skip_while(|line| *line != "//! ```toml")
        .skip(1)
        .take_while(|line| *line != "//! ```")
        .map(|line| format!("{}\n", line.trim_start_matches("//!").trim_start()))
        .collect();
    assert!(load(&example).unwrap().counter("input_spikes").is_some());
}

#[test]
fn explanations_fill_the_formula_in() {
    let rules = load(SPIKES).unwrap();
    let traces = Traces::of("small", spiking_tape().trace());
    let explanation = explain(&traces, &rules, &named(&["spikes"]), "aten::addmm").unwrap();
    let mut text = Vec::new();
    explanation.write_text(&mut text).unwrap();
    let text = String::from_utf8(text).unwrap();
    assert!(text.contains("nonzeros(mat1) = 7"), "{text}");
    assert!(text.contains("from the test"), "{text}");
}

#[test]
fn rules_are_put_in_front_of_those_of_another_set() {
    let text = r#"
name = "lab"
extends = "optape"
ignore = ["LIF*"]

[counters.flop]
ignore = ["Net.none"]
rules."mylib::unheard" = { formula = "elements(self)", source = "its authors", tests = [
  { given = { self = "float32[2, 4]" }, expect = 8 },
  { given = { self = "float32[0, 4]" }, calls = 3, expect = 0 },
] }
rules."aten::addmm" = { zero = "a test", source = "the test" }
"#;
    let rules = load(text).unwrap();
    let (own, base) = (
        replay(&rules, &Request::default()).unwrap(),
        replay(&RuleSet::named("optape").unwrap(), &Request::default()).unwrap(),
    );
    let flop = |report: &Report, op: &str| {
        let scopes = &report.counters.get("flop").unwrap().scopes;
        scopes.get("Global").and_then(|ops| ops.get(op)).copied()
    };
    assert!(flop(&base, "aten.addmm.default").is_some());
    assert_eq!(flop(&own, "aten.addmm.default"), None);
    assert_eq!(flop(&base, "mylib.unheard.default"), None);
    assert!(flop(&own, "mylib.unheard.default").is_some());
    // What the neuron did is ignored in all counters.
    assert!(flop(&base, "aten.add.Tensor").is_some());
    assert_eq!(flop(&own, "aten.add.Tensor"), None);
    let coverage = own.coverage.counters.get("flop").unwrap();
    assert_eq!(coverage.unknown, 0);
    assert_eq!(own.rules.description, "my.toml, extends optape 2");
    // The presets of the set that it extends are its own.
    assert!(own.energy.get("compute_fp32").is_some());
    assert_eq!(own.energy.get("compute_fp32").unwrap().rules, "lab");
}

#[test]
fn a_counter_like_another_has_settings_of_its_own() {
    let text = r#"
name = "lab"
extends = "spikingjelly-2026-06"
[counters.tiny]
like = "memory_residency"
sram_kib = 0.0625
registers_kib = 0
[counters.memory_residency_small]
sram_kib = 8
"#;
    let rules = load(text).unwrap();
    let settings = |name: &str| rules.counter(name).unwrap().settings();
    assert_eq!(settings("tiny"), BTreeMap::from([("registers_kib", 0.0), ("sram_kib", 0.0625)]));
    assert_eq!(settings("memory_residency_small")["sram_kib"], 8.0);
    assert_eq!(settings("memory_residency_small")["registers_kib"], 2.0);
    assert_eq!(rules.presets(), "spikingjelly-2026-06");
    let traces = Traces::of("full", crate::ordered::tests::full_trace());
    let bits = |request: &Request, counter: &str, level: &str| {
        let report = evaluate(&traces, &rules, request).unwrap();
        report.counters.get(counter).unwrap().details["level_bits"].at(&[level])
    };
    let both = named(&["tiny", "memory_residency"]);
    assert_eq!(bits(&both, "tiny", "reg"), 0);
    assert!(bits(&both, "tiny", "dram") > bits(&both, "memory_residency", "dram"));
    // What is set on the command line wins.
    let set = Request {
        settings: vec![Assignment::parse("tiny.sram_kib=1MiB").unwrap()],
        ..both
    };
    assert_eq!(
        bits(&set, "tiny", "dram"),
        bits(&set, "memory_residency", "dram")
    );
}

#[test]
fn simulations_do_not_see_what_is_ignored() {
    let text = "name = 'lab'\nextends = 'spikingjelly-2026-06'\n[counters.neuron_state]\nignore = ['BaseNode']\n";
    let rules = load(text).unwrap();
    let traces = Traces::of("full", crate::ordered::tests::full_trace());
    let total = |rules: &RuleSet| {
        let report = evaluate(&traces, rules, &named(&["neuron_state"])).unwrap();
        report.counters.get("neuron_state").unwrap().total
    };
    assert!(total(&RuleSet::named("spikingjelly-2026-06").unwrap()) > 0);
    assert_eq!(total(&rules), 0);
}

/// A file with one rule.
fn rule(formula: &str, test: &str) -> String {
    format!(
        "name = 'lab'\n[counters.x]\nunit = 'u'\n[counters.x.rules.'aten::mm']\nformula = \"{formula}\"\nsource = 's'\ntests = [{{ {test} }}]\n"
    )
}

const GIVEN: &str = "given = { self = 'float32[2, 3]', mat2 = 'float32[3, 4]', out = 'float32[2, 4]', groups = 0, alpha = 0.5, dims = [1, 2], bias = 'None' }";

fn of(formula: &str) -> String {
    message(&rule(formula, &format!("{GIVEN}, statistics = {{ 'nonzeros(self)' = 5, 'binary(self)' = true }}, expect = -1")))
}

#[test]
fn formulas_compute_exactly() {
    let gives = |formula: &str, wanted: i128| {
        let text = format!("the rule of aten::mm gives {wanted} here, not -1");
        assert!(of(formula).ends_with(&text), "{formula}: {}", of(formula));
    };
    gives("2 * size(self, 0) * size(self, -1) * size(mat2, 1) - elements(out)", 40);
    gives("elements(self) / 4 + 1 / 2", 2);
    gives("7 // 2 + 7 % 2 + -7 // 2 + ceil(7 / 2) + 2^3", 12);
    gives("nonzeros(self) * size(mat2, 1) / 2", 10);
    gives("elements(self) - nonzeros(self)", 1);
    gives("bytes(self) + element_bytes(out) * dimensions(out)", 32);
    gives("sum(shape(self)) + product(dims) + len(dims) + dims[-1] + max(1, 3, 2) + min(4, 5) + abs(-2)", 20);
    gives("if(alpha == 1, 1, 0) + if(dtype(self) == 'float32' and not is_number(self), 1, 0)", 1);
    gives("if(given(bias), bias, 3)", 3);
    gives("170141183460469231731687303715884105727 / 170141183460469231731687303715884105727", 1);
    gives("elements_from(self, 1) + elements(outputs) + bytes(outputs[0])", 43);
}

#[test]
fn mistakes_of_formulas_are_told_with_line_and_column() {
    assert!(of("2 * slef").starts_with("my.toml:5:16: there is no variable 'slef'; did you mean 'self'?"), "{}", of("2 * slef"));
    assert!(of("1 / groups").starts_with("my.toml:5:12: division by zero"));
    assert!(of("1 % groups").contains("division by zero"));
    assert!(of("10^38 * 10^38").starts_with("my.toml:5:12: overflow"));
    assert!(of("1 / 3").contains("the count is 1/3, no whole number"));
    assert!(of("1 - 2").contains("a count is at least 0"));
    assert!(of("elemnts(self)").contains("there is no function 'elemnts'; did you mean 'elements'?"));
    assert!(of("self + 1").contains("a number is wanted here, not a tensor"));
    assert!(of("size(self, 2)").contains("2 dimensions has no dimension 2"));
    assert!(of("size(self)").contains("it is written size(tensor, d)"));
    assert!(of("dims[2]").contains("a list of 2 has no item 2"));
    assert!(of("alpha + 1").contains("a number that differs from call to call"));
    assert!(of("nonzeros(self) * nonzeros(self)").contains("two statistics are not multiplied"));
    assert!(of("nonzeros(self) // 2").contains("a number of every call is wanted here"));
    assert!(of("1 / nonzeros(self)").contains("nothing is divided by a statistic"));
    assert!(of("if(nonzeros(self) > 0, 1, 0)").contains("a number of every call is wanted here"));
    assert!(of("if(nonzeros(self) == 0, 1, 0)").contains("statistics are not compared"));
    assert!(of("nonzeros(mat2)").contains("the test does not give nonzeros(mat2) of aten::mm"), "{}", of("nonzeros(mat2)"));
    assert!(of("nonzeros_after(self)").contains("the op does not write 'self'"));
    assert!(of("binary(self)").contains("a count is a number, not true or false"));
    assert!(of("1 +").starts_with("my.toml:5:15: the formula ends where a value is wanted"));
    // Where no test comes by.
    let unseen = rule("if(binary(self), 1, selff)", "given = { self = 'float32[2]' }, statistics = { 'binary(self)' = true }, expect = 1");
    assert!(message(&unseen).contains("there is no variable 'selff'; did you mean 'self'?, in a rule for aten::mm that its tests give"), "{}", message(&unseen));
}

#[test]
fn mistakes_of_files_are_told_with_line_and_column() {
    let with = |from: &str, to: &str| {
        assert!(SPIKES.contains(from), "{from}");
        message(&SPIKES.replacen(from, to, 1))
    };
    assert_eq!(with("name = \"lab\"", ""), "my.toml:1:1: 'name' is missing: a rule set has one");
    assert!(with("\"lab\"", "\"optape\"").starts_with("my.toml:2:8: there is a rule set 'optape' already"));
    assert!(with("version = 3", "version = 3.5").contains("'version' is a whole number"));
    assert!(with("version", "versoin").starts_with("my.toml:3:1: there is no key 'versoin'; did you mean 'version'?"));
    assert!(with("unit = \"spike\"", "").contains("the counter 'spikes' is new: give it a 'unit'"));
    assert!(with("unit", "like = 'nothing'\nunit").contains("there is no counter 'nothing'"));
    assert!(with("aten::add.Tensor", "aten.add.Tensor").contains("'aten.add.Tensor' is no op"));
    assert!(with("aten::add.Tensor", "aten::*").contains("'aten::*' is no op"));
    assert!(message(&SPIKES.replace("source = \"the test\"", "")).contains("has no 'source'"));
    assert!(with("zero = \"no layer\"", "").contains("neither a 'formula' nor a reason"));
    assert!(with("zero = \"no layer\"", "zero = \"\"").contains("'zero' is a text"));
    assert!(with("zero = \"no layer\"", "formula = '1'\nzero = 'x'").contains("not both"));
    assert!(with("zero = \"no layer\"", "formula = '1'").contains("the rule of aten::add.Tensor has no 'tests'"));
    assert!(with("zero = \"no layer\"", "formula = '1'\ntests = []").contains("has no test"));
    assert!(with("expect = 5", "expect = 6").starts_with("my.toml:16:"), "{}", with("expect = 5", "expect = 6"));
    assert!(with("expect = 5", "").contains("'expect'"));
    assert!(with("expect = 5", "expect = 5.0").contains("'expect' is a whole number"));
    assert!(with("\"nonzeros(mat1)\" = 5", "\"nonzeros(mat2)\" = 5").contains("no tensor 'mat2'"));
    assert!(with("\"nonzeros(mat1)\" = 5", "\"nonzero(mat1)\" = 5").contains("is no statistic"));
    assert!(with("float32[2, 3]", "float32[2, x]").contains("a text is a tensor"));
    assert!(with("float32[2, 3]", "float32[99999999999, 3]").contains("cannot have existed"));
    assert!(with("given =", "gven =").contains("did you mean 'given'?"));
    assert!(with("[define]", "ignore = 'x'\n[define]").contains("'ignore' is a list"));
    assert!(with("calls_of_layers = \"1\"", "out = '1'").contains("is no name for a definition"));
    assert!(with("[counters.spikes]", "[counters.spikes").starts_with("my.toml:"));
}

#[test]
fn what_needs_itself_is_refused() {
    let text = "name = 'lab'\n[define]\na = '1 + b'\nb = 'c * 2'\nc = 'a'\n";
    assert_eq!(message(text), "my.toml:3:6: 'a' needs itself: a -> b -> c -> a");
    assert_eq!(message("name = 'lab'\n[define]\na = 'a'\n"), "my.toml:3:6: 'a' needs itself: a -> a");
    // Much work in few characters is done once.
    let mut doubling = "name = 'lab'\n[define]\nd0 = '1'\n".to_owned();
    for at in 1..60 {
        doubling += &format!("d{at} = 'd{} + d{}'\n", at - 1, at - 1);
    }
    doubling += "[counters.x]\nunit = 'u'\nrules.'aten::mm' = { formula = 'd59', source = 's', tests = [{ expect = 576460752303423488 }] }\n";
    load(&doubling).unwrap();
}

#[test]
fn files_extend_each_other_but_not_in_circles_and_not_under_one_name() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| {
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        path.display().to_string()
    };
    let base = write("base.toml", "name = 'base'\nextends = 'optape'\n");
    let lab = write("lab.toml", "name = 'lab'\nextends = 'base.toml'\nversion = 2\n");
    let set = RuleSet::load(&lab).unwrap();
    assert_eq!((set.name.as_ref(), set.presets()), ("lab", "optape"));
    assert!(set.counter("flop").is_some());
    write("a.toml", "name = 'a'\nextends = 'b.toml'\n");
    let circle = write("b.toml", "name = 'b'\nextends = 'a.toml'\n");
    let error = RuleSet::load(&circle).unwrap_err().to_string();
    assert!(error.contains("extend each other in a circle"), "{error}");
    let same = write("same.toml", "name = 'base'\nextends = 'base.toml'\n");
    let error = RuleSet::load(&same).unwrap_err().to_string();
    assert!(error.contains("is a rule set 'base' already"), "{error}");
    let twin = write("twin.toml", "name = 'lab'\n");
    let error = RuleSet::load_all(&[lab, base, twin]).unwrap_err().to_string();
    assert!(error.contains("are rule sets of one name, 'lab'"), "{error}");
    let error = RuleSet::load("no/such.toml").unwrap_err().to_string();
    assert!(error.contains("no/such.toml"), "{error}");
    assert!(RuleSet::load("optap").unwrap_err().to_string().contains("did you mean 'optape'?"));
    let wrong = write("wrong.toml", "name = 'w'\nextends = 'optap'\n");
    let error = RuleSet::load(&wrong).unwrap_err().to_string();
    assert!(error.contains(":2:11: ") && error.contains("did you mean 'optape'?"), "{error}");
}

#[test]
fn a_mistake_that_a_trace_shows_is_an_error_whatever_was_asked_for() {
    let text = r#"
name = "lab"
[counters.x]
unit = "u"
[counters.x.rules."aten::addmm"]
formula = "elements(mat3)"
source = "the test"
tests = [{ given = { mat3 = "float32[2]" }, expect = 2 }]
"#;
    for request in [Request::default(), named(&["x"])] {
        let error = replay(&load(text).unwrap(), &request).unwrap_err();
        assert_eq!(
            error.to_string(),
            "my.toml:6:21: there is no variable 'mat3'; did you mean 'mat1'?, in a call of aten::addmm"
        );
    }
    // What the trace lacks is no mistake: it is a level, and named.
    let text = text.replace("elements(mat3)", "nonzeros(self)").replace("mat3 = \"float32[2]\" }", "self = \"float32[2]\" }, statistics = { \"nonzeros(self)\" = 2 }");
    let error = replay(&load(&text).unwrap(), &named(&["x"])).unwrap_err();
    assert!(matches!(error, ReplayError::MissingLevel { .. }), "{error}");
}

proptest! {
    /// Over whole numbers the language is ordinary arithmetic, and over statistics it is linear.
    #[test]
    fn formulas_are_arithmetic(a in 0i128..1000, b in 1i128..1000, c in 0i128..1000, calls in 1u64..5, spikes in 0u64..50) {
        let test = |formula: &str, expect: i128| {
            let text = rule(
                formula,
                &format!("given = {{ self = 'float32[2]', a = {a}, b = {b}, c = {c} }}, statistics = {{ 'nonzeros(self)' = {spikes} }}, calls = {calls}, expect = {expect}"),
            );
            load(&text).map(|_| ()).map_err(|error| TestCaseError::fail(format!("{formula}: {error}")))
        };
        let n = i128::from(calls);
        let spikes = i128::from(spikes);
        test("a + b * c", (a + b * c) * n)?;
        test("a // b + c % b", (a / b + c % b) * n)?;
        test("(a / b) * b + max(a, c) - min(a, c)", (a + a.max(c) - a.min(c)) * n)?;
        test("if(a < c, b, a^2)", if a < c { b } else { a * a } * n)?;
        test("nonzeros(self) * b + c", spikes * b + c * n)?;
        test("(a + nonzeros(self)) * 3 - nonzeros(self) * 3", a * 3 * n)?;
    }

    #[test]
    fn any_formula_is_computed_or_refused(formula in "(a|b|self|nonzeros\\(self\\)|[0-9]{1,40}|size\\(self, 0\\))( ?(\\+|-|\\*|/|//|%|\\^|<|==|and) ?(a|b|self|nonzeros\\(self\\)|[0-9]{1,3})){0,6}") {
        let text = rule(&formula, "given = { self = 'float32[2]', a = 7, b = 0 }, statistics = { 'nonzeros(self)' = 3 }, expect = 1");
        let _ = load(&text);
    }

    #[test]
    fn any_file_is_read_or_refused(at in 0usize..1200, with in "[a-z0-9'\"\\[\\]{}=., ]{0,4}") {
        let at = (0..=at.min(SPIKES.len())).rev().find(|at| SPIKES.is_char_boundary(*at)).unwrap();
        let _ = load(&format!("{}{with}{}", &SPIKES[..at], &SPIKES[at..]));
    }
}
