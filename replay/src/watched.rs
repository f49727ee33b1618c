//! SpikingJelly's monitors, after the fact: what `--watch` recorded of modules, one record for each call.
//!
//! A record says of a tensor its shape, type, sum, mean, nonzeros and, where all elements are 0 or 1, its firing rate. Any other function of
//! the values themselves needs kept values: [`crate::values`].

use std::collections::{BTreeMap, HashMap};

use optape_trace::{ModuleDef, ModuleId, State};

use crate::energy::Figure;
use crate::evaluate::{Followed, Refusal, Request};
use crate::network::Form;
use crate::ordered::{Amounts, Simulation, WatchedCall, World};
use crate::report::Ordered;
use crate::report::layers::{About, tensor};
use crate::rules::{MissingLevel, RuleError, WayOut};
use crate::selection::Glob;
use crate::{ReplayError, nearest};

/// The rules that the records follow.
const RULES: &str = "spikingjelly-2.0.0";

/// Which watched values are asked for: of which modules, and what of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WatchSelection {
    /// A class or a module, by name or glob; `None`: all.
    pub modules: Option<Glob>,
    /// `output`, `input`, `grad_output`, `grad_input`, or an attribute.
    pub what: String,
}

impl WatchSelection {
    /// `output`, `IFNode:output,v`, `fc*:input`.
    ///
    /// # Errors
    /// Where the text is none of these.
    pub fn parse(text: &str) -> Result<Vec<Self>, String> {
        let (modules, names) = match text.rsplit_once(':') {
            Some((modules, names)) => (Some(modules.trim()), names),
            None => (None, text),
        };
        let bad = || {
            format!("'{text}' says not what of which modules: write output, or 'IFNode:output,v'")
        };
        if modules.is_some_and(str::is_empty) {
            return Err(bad());
        }
        names
            .split(',')
            .map(str::trim)
            .map(|what| {
                if what.is_empty() {
                    return Err(bad());
                }
                Ok(Self {
                    modules: modules.map(Glob::new),
                    what: what.to_owned(),
                })
            })
            .collect()
    }

    pub(crate) fn takes(&self, module: &WatchedModule) -> bool {
        self.modules
            .as_ref()
            .is_none_or(|glob| module.names().any(|name| glob.matches(name)))
    }
}

/// Which monitors are asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum WatchesWanted {
    /// None.
    #[default]
    None,
    /// All that there are.
    All,
    /// These.
    Selected(Vec<WatchSelection>),
}

/// What a monitor is called in reports: those of attributes by the attribute.
pub(crate) fn monitor_name(what: &str) -> String {
    match what {
        "output" | "input" | "grad_output" | "grad_input" => what.to_owned(),
        attribute => format!("attribute_{attribute}"),
    }
}

/// `output.1` is the second tensor of `output`.
pub(crate) fn place_of(what: &str) -> (&str, usize) {
    let numbered = what
        .rsplit_once('.')
        .and_then(|(what, place)| Some((what, place.parse().ok()?)));
    numbered.unwrap_or((what, 0))
}

/// A tensor.
#[derive(Clone, Debug)]
struct Seen {
    form: Form,
    nonzeros: Option<u64>,
    sum: Option<f64>,
    binary: Option<bool>,
    state: Option<State>,
}

/// A module of which something was watched.
#[derive(Clone, Debug)]
pub(crate) struct WatchedModule {
    /// As scopes name it.
    name: String,
    classes: Vec<String>,
    /// Its path below the main root: the first of `named_modules()`.
    path: String,
}

impl WatchedModule {
    pub(crate) fn of(definition: Option<&ModuleDef>, path: Option<&str>) -> Self {
        let name = definition.map_or_else(String::new, |def| def.name.clone());
        Self {
            path: path.unwrap_or(&name).to_owned(),
            classes: definition.map_or_else(Vec::new, |def| def.classes.clone()),
            name,
        }
    }

    /// Its path; its name where it is the root.
    pub(crate) fn shown(&self) -> &str {
        if self.path.is_empty() {
            &self.name
        } else {
            &self.path
        }
    }

    /// What it can be asked for by, as `optape record --watch` has it.
    fn names(&self) -> impl Iterator<Item = &str> {
        let below = self.name.split_once('.').map(|(_, below)| below);
        let short = self
            .classes
            .iter()
            .map(|class| class.rsplit('.').next().unwrap_or(class));
        std::iter::once(self.name.as_str())
            .chain(below)
            .chain((!self.path.is_empty()).then_some(self.path.as_str()))
            .chain(self.classes.iter().map(String::as_str))
            .chain(short)
    }
}

/// The records of a stream.
#[derive(Clone, Debug, Default)]
struct Records {
    rank: Option<u32>,
    /// By module and what was watched: calls, each with its tensors.
    of: Vec<(ModuleId, String, Vec<Vec<Seen>>)>,
    modules: HashMap<ModuleId, WatchedModule>,
    root: String,
}

/// Follows the watches of a stream.
#[derive(Default)]
struct Following {
    records: Records,
    places: HashMap<(ModuleId, String), usize>,
}

/// What follows a stream for the monitors.
pub(crate) fn simulation(rank: Option<u32>) -> Box<dyn Simulation> {
    Box::new(Following {
        records: Records {
            rank,
            ..Records::default()
        },
        ..Following::default()
    })
}

impl Simulation for Following {
    fn wants_calls(&self) -> bool {
        false
    }

    fn watched(
        &mut self,
        _world: &World<'_>,
        call: &WatchedCall<'_>,
        _out: &mut Amounts,
    ) -> Result<(), RuleError> {
        let Some(module) = call.definition.module else {
            return Ok(());
        };
        let (what, place) = place_of(&call.definition.what);
        let at = *self
            .places
            .entry((module, what.to_owned()))
            .or_insert_with(|| {
                self.records.of.push((module, what.to_owned(), Vec::new()));
                self.records.of.len() - 1
            });
        let form = Form {
            shape: call.meta.shape.clone(),
            dtype: call.meta.dtype,
        };
        let figures = crate::network::Figures::of(&form, call.known);
        let seen = Seen {
            form,
            nonzeros: figures.nonzeros,
            sum: figures.sum,
            binary: figures.binary,
            state: call.state,
        };
        if let Some((_, _, calls)) = self.records.of.get_mut(at) {
            match calls.last_mut() {
                // Tensors of one call come one after the other.
                Some(last) if place > 0 && last.len() == place => last.push(seen),
                _ => calls.push(vec![seen]),
            }
        }
        Ok(())
    }

    fn finish(&mut self, world: &World<'_>, out: &mut Amounts) -> Result<(), RuleError> {
        if self.records.of.is_empty() {
            return Ok(());
        }
        let mut records = std::mem::take(&mut self.records);
        let paths = Paths::of(world);
        records.root.clone_from(&paths.root);
        for (module, _, _) in &records.of {
            let definition = world.definition(*module);
            let path = paths.path(*module, definition.map_or("", |def| &def.name));
            let watched = WatchedModule::of(definition, Some(&path));
            records.modules.insert(*module, watched);
        }
        out.keep(records);
        Ok(())
    }
}

/// Paths of modules as `named_modules()` of the main root gives them.
pub(crate) struct Paths {
    /// Name of the main root: of the modules that were called by none the one with the most parameters.
    pub(crate) root: String,
    of: HashMap<ModuleId, String>,
}

impl Paths {
    pub(crate) fn of(world: &World<'_>) -> Self {
        let trees: Vec<(ModuleId, Vec<(String, ModuleId)>)> = world
            .roots()
            .iter()
            .map(|root| (*root, world.named_modules(*root)))
            .collect();
        let size = |tree: &[(String, ModuleId)]| -> i128 {
            tree.iter()
                .filter_map(|(_, module)| world.module(*module))
                .flat_map(|state| state.parameters().map(|(_, elements, _)| elements))
                .sum()
        };
        let name = |root: ModuleId| world.definition(root).map_or("", |def| def.name.as_str());
        let mut main: Option<(usize, i128)> = None;
        for (at, (_, tree)) in trees.iter().enumerate() {
            let size = size(tree);
            if main.is_none_or(|(_, most)| size > most) {
                main = Some((at, size));
            }
        }
        let mut paths = Self {
            root: String::new(),
            of: HashMap::new(),
        };
        let Some((main, _)) = main else {
            return paths;
        };
        if let Some((root, tree)) = trees.get(main) {
            name(*root).clone_into(&mut paths.root);
            for (path, module) in tree {
                paths.of.entry(*module).or_insert_with(|| path.clone());
            }
        }
        for (root, tree) in &trees {
            for (path, module) in tree {
                let whole = if path.is_empty() {
                    name(*root).to_owned()
                } else {
                    format!("{}.{path}", name(*root))
                };
                paths.of.entry(*module).or_insert(whole);
            }
        }
        paths
    }

    /// The path of a module; its name where it is below no root.
    pub(crate) fn path(&self, module: ModuleId, name: &str) -> String {
        self.of
            .get(&module)
            .cloned()
            .unwrap_or_else(|| name.to_owned())
    }
}

/// The reports of the monitors, and why others are not there.
#[derive(Debug, Default)]
pub(crate) struct Monitors {
    pub(crate) reports: Ordered<Figure>,
    pub(crate) rates: Ordered<Figure>,
    pub(crate) about: Ordered<About>,
    pub(crate) skipped: BTreeMap<String, String>,
}

fn nothing_watched(what: &str, modules: Option<&Glob>) -> RuleError {
    let modules = modules.map_or_else(|| "*".to_owned(), ToString::to_string);
    RuleError::Missing(Box::new(MissingLevel {
        level: "T1",
        what: format!("the {what} of modules, which nothing watched,"),
        way_out: WayOut::Other(format!(
            "record with `optape record --watch '{modules}:{what}'`"
        )),
    }))
}

/// Makes the reports.
///
/// # Errors
/// Where one that was asked for by name cannot be given.
pub(crate) fn evaluate(
    wanted: &WatchesWanted,
    followed: Option<&Followed>,
    request: &Request,
) -> Result<Monitors, ReplayError> {
    let mut monitors = Monitors::default();
    let (Some(followed), true) = (followed, *wanted != WatchesWanted::None) else {
        return Ok(monitors);
    };
    let streams: Vec<&Records> = followed.kept().collect();
    let mut kinds: Vec<&str> = Vec::new();
    for (_, what, _) in streams.iter().flat_map(|records| &records.of) {
        if !kinds.contains(&what.as_str()) {
            kinds.push(what);
        }
    }
    let order = |what: &str| {
        ["output", "input"].iter().position(|known| *known == what).unwrap_or_else(|| {
            if what.starts_with("grad_") { 3 } else { 2 }
        })
    };
    kinds.sort_by_key(|what| (order(what), (*what).to_owned()));
    if let WatchesWanted::Selected(selected) = wanted {
        for one in selected {
            let found = streams.iter().any(|records| {
                records.of.iter().any(|(module, what, _)| {
                    *what == one.what
                        && records.modules.get(module).is_some_and(|m| one.takes(m))
                })
            });
            if found {
                continue;
            }
            let label = format!("monitors/{}", monitor_name(&one.what));
            let of_no_module = one.modules.as_ref().filter(|glob| {
                !streams
                    .iter()
                    .flat_map(|records| records.modules.values())
                    .any(|module| module.names().any(|name| glob.matches(name)))
            });
            let error = match of_no_module {
                Some(glob) => {
                    let near = streams
                        .iter()
                        .flat_map(|records| records.modules.values())
                        .flat_map(WatchedModule::names);
                    let pattern = glob.to_string();
                    let hint = nearest(&pattern, near)
                        .map(|near| format!("; did you mean '{near}'?"))
                        .unwrap_or_default();
                    RuleError::Missing(Box::new(MissingLevel {
                        level: "T1",
                        what: format!("anything watched of '{pattern}'{hint}"),
                        way_out: WayOut::Other(format!(
                            "record with `optape record --watch '{pattern}:{}'`",
                            one.what
                        )),
                    }))
                }
                None => nothing_watched(&one.what, one.modules.as_ref()),
            };
            return Err(Refusal::of(&error).error(&label));
        }
    }
    let named = matches!(wanted, WatchesWanted::Selected(_));
    for what in &kinds {
        let name = monitor_name(what);
        let takes = |module: &WatchedModule| match wanted {
            WatchesWanted::None => false,
            WatchesWanted::All => true,
            WatchesWanted::Selected(selected) => selected
                .iter()
                .any(|one| one.what == **what && one.takes(module)),
        };
        if named && !streams.iter().any(|r| r.of.iter().any(|(m, of, _)| of == what && r.modules.get(m).is_some_and(takes))) {
            continue;
        }
        match monitor(&streams, what, takes, request.lenient) {
            Ok((report, rates, about)) => {
                monitors.reports.push(&name, report);
                monitors.rates.push(&name, rates);
                monitors.about.push(&name, about);
            }
            Err(error) if named => {
                return Err(Refusal::of(&error).error(&format!("monitors/{name}")));
            }
            Err(error) => {
                monitors.skipped.insert(format!("monitors/{name}"), error.to_string());
            }
        }
    }
    if !named {
        for what in ["output", "input", "grad_input", "grad_output"] {
            if !kinds.contains(&what) {
                let why = nothing_watched(what, None).to_string();
                monitors.skipped.insert(format!("monitors/{what}"), why);
            }
        }
    }
    Ok(monitors)
}

/// All records of a kind.
fn monitor(
    streams: &[&Records],
    what: &str,
    takes: impl Fn(&WatchedModule) -> bool,
    lenient: bool,
) -> Result<(Figure, Figure, About), RuleError> {
    let mut about = About {
        unit: "elements; spikes per element",
        boundary: "what the watches of the recording saw; calls without such a tensor have no record",
        rules: RULES,
        model: streams
            .first()
            .map_or_else(String::new, |records| records.root.clone()),
        ..About::default()
    };
    let (mut report, mut rates) = (Ordered::default(), Ordered::default());
    let several = streams.len() > 1;
    for (number, records) in streams.iter().enumerate() {
        for (id, _, calls) in records.of.iter().filter(|(_, of, _)| of == what) {
            let Some(module) = records.modules.get(id).filter(|module| takes(module)) else {
                continue;
            };
            let path = match (several, records.rank) {
                (false, _) => module.path.clone(),
                (true, Some(rank)) => format!("rank{rank}/{}", module.path),
                (true, None) => format!("process{number}/{}", module.path),
            };
            let mut rate = Rates::default();
            let mut list = Vec::with_capacity(calls.len());
            for call in calls {
                let mut tensors = Vec::with_capacity(call.len());
                for seen in call {
                    about.counted += 1;
                    rate.add(seen);
                    tensors.push(match (seen.sum, seen.nonzeros, seen.binary) {
                        (Some(sum), Some(nonzeros), Some(binary)) => {
                            tensor(&seen.form, sum, Some(nonzeros), binary.then_some(nonzeros))
                        }
                        _ if lenient => {
                            about.partial(format!("statistics of the {what} of {}", module.name));
                            tensor(&seen.form, f64::NAN, seen.nonzeros, None)
                        }
                        _ => return Err(unknown(seen, what, &module.name)),
                    });
                }
                list.push(match tensors.len() {
                    1 => tensors.pop().unwrap_or(Figure::None),
                    _ => Figure::List(tensors),
                });
            }
            report.push(&path, Figure::List(list));
            rates.push(&path, rate.figure(calls.len()));
        }
    }
    about.warnings.dedup();
    Ok((Figure::Map(report), Figure::Map(rates), about))
}

fn unknown(seen: &Seen, what: &str, name: &str) -> RuleError {
    RuleError::Missing(Box::new(MissingLevel {
        level: "T1",
        what: format!("the values of the {what} of {name}"),
        way_out: match seen.state {
            Some(State::NotTaken(why)) => WayOut::NotTaken(why),
            Some(State::Lost) => WayOut::Lost,
            Some(State::Pending) => WayOut::Pending,
            Some(State::Present) | None => WayOut::Record(optape_trace::needs::RULES_FLAG),
        },
    }))
}

/// All records of a module together.
#[derive(Debug)]
struct Rates {
    elements: u64,
    nonzeros: Option<u64>,
    binary: bool,
}

impl Default for Rates {
    fn default() -> Self {
        Self {
            elements: 0,
            nonzeros: Some(0),
            binary: true,
        }
    }
}

impl Rates {
    fn add(&mut self, seen: &Seen) {
        self.elements = self.elements.saturating_add(seen.form.elements());
        self.nonzeros = self
            .nonzeros
            .zip(seen.nonzeros)
            .map(|(a, b)| a.saturating_add(b));
        self.binary &= seen.binary == Some(true);
    }

    fn figure(&self, calls: usize) -> Figure {
        #[expect(clippy::cast_precision_loss, reason = "a rate is a float")]
        let rate = self
            .nonzeros
            .filter(|_| self.binary && self.elements > 0)
            .map(|nonzeros| nonzeros as f64 / self.elements as f64);
        Figure::from([
            ("calls", Figure::Integer(calls as i128)),
            ("elements", Figure::Integer(i128::from(self.elements))),
            ("nonzeros", Figure::from(self.nonzeros.map(i128::from))),
            ("firing_rate", Figure::from(rate)),
        ])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_asked_for_reads_as_what_was_watched() {
        let parse = |text: &str| WatchSelection::parse(text);
        assert_eq!(
            parse("IFNode:output,v").unwrap(),
            ["output", "v"].map(|what| WatchSelection {
                modules: Some(Glob::new("IFNode")),
                what: what.to_owned()
            })
        );
        assert_eq!(parse("input").unwrap()[0].modules, None);
        for bad in ["", ":output", "IFNode:", "IFNode:output,"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn further_tensors_of_a_call_belong_to_its_record() {
        assert_eq!(place_of("output"), ("output", 0));
        assert_eq!(place_of("output.2"), ("output", 2));
        assert_eq!(place_of("v.before"), ("v.before", 0));
        assert_eq!(place_of("v.before.1"), ("v.before", 1));
        assert_eq!(monitor_name("v.before"), "attribute_v.before");
        assert_eq!(monitor_name("grad_input"), "grad_input");
    }

    #[test]
    fn modules_are_asked_for_by_name_path_and_class() {
        let module = WatchedModule {
            name: "Net.layers.0".to_owned(),
            classes: vec!["my.lib.LIF".to_owned(), "torch.nn.modules.module.Module".to_owned()],
            path: "first.0".to_owned(),
        };
        let takes = |pattern: &str| {
            WatchSelection {
                modules: Some(Glob::new(pattern)),
                what: "output".to_owned(),
            }
            .takes(&module)
        };
        for pattern in ["LIF", "my.lib.LIF", "layers.0", "first.*", "Net.layers.?", "Module"] {
            assert!(takes(pattern), "{pattern}");
        }
        assert!(!takes("IF"));
    }
}
