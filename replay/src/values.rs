//! Kept values (T8) for other programs: NumPy's `.npz` and safetensors.
//!
//! With the values themselves any function of them can be computed after the fact: rasters, histograms, correlations. Each value is an array
//! `MODULE/WHAT/NUMBER`, the number counting the selected calls; stacked, all values of one module are one array with the calls as first
//! dimension. Types stay as they are but for those that the target does not have.

use std::borrow::Cow;
use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{self, BufWriter, Seek, Write};
use std::path::Path;

use optape_trace::{Columns, DType, Elements, Event, ModuleId, ThreadId, Value};
use serde::Serialize;

use crate::error::ReplayError;
use crate::load::{StreamRef, Traces};
use crate::ordered::KeptValues;
use crate::selection::Selection;
use crate::watched::{WatchSelection, WatchedModule, place_of};

/// What to export.
#[derive(Clone, Debug, Default)]
pub struct ValuesRequest {
    /// Ranges, steps and ranks; scopes and excluded modules by name. Stages and ops are not looked at.
    pub selection: Selection,
    /// Modules and what of them; empty: all.
    pub watches: Vec<WatchSelection>,
}

/// A file to export to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ValuesFormat {
    /// NumPy's archive of arrays, compressed.
    Npz,
    /// Of Hugging Face.
    Safetensors,
}

/// A value that is there.
#[derive(Clone, Debug)]
struct Entry {
    /// Index into the streams.
    stream: usize,
    ordinal: u64,
    dtype: DType,
    shape: Vec<u64>,
}

/// An array to be written.
#[derive(Clone, Debug)]
struct Array {
    name: String,
    dtype: DType,
    shape: Vec<u64>,
    /// What it is made of, one behind the other.
    parts: Vec<Entry>,
}

/// The values that a selection holds.
pub struct Values<'a> {
    streams: Vec<(StreamRef<'a>, KeptValues<'a>)>,
    traces: &'a Traces,
    groups: Vec<ValuesGroup>,
    entries: Vec<Vec<Entry>>,
}

/// The values of one module and one thing of it.
#[derive(Clone, Debug, Serialize)]
pub struct ValuesGroup {
    /// The module's path below the root, and what was watched: `sn1/output`.
    pub name: String,
    /// As scopes name it.
    pub module: String,
    /// Its class.
    pub class: String,
    /// What was watched.
    pub what: String,
    /// How many values.
    pub values: u64,
    /// Those that were to be kept and are lost.
    #[serde(skip_serializing_if = "is_zero")]
    pub lost: u64,
    /// Element types.
    pub dtypes: Vec<&'static str>,
    /// Shapes, each once, eight at most.
    pub shapes: Vec<Vec<u64>>,
    /// Elements of all.
    pub elements: u64,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde asks so")]
const fn is_zero(number: &u64) -> bool {
    *number == 0
}

const SHAPES_SHOWN: usize = 8;

impl<'a> Values<'a> {
    /// Finds the values that a request selects.
    ///
    /// # Errors
    /// Where the trace cannot be read, keeps no values, or the selection selects none.
    pub fn of(traces: &'a Traces, request: &ValuesRequest) -> Result<Self, ReplayError> {
        let selection = &request.selection;
        let needed = !selection.is_whole_run();
        let timelines = traces.timelines(needed, &selection.ranges)?;
        selection.check(traces, &timelines)?;
        let mut values = Values {
            streams: Vec::new(),
            traces,
            groups: Vec::new(),
            entries: Vec::new(),
        };
        let with_values = |at: &StreamRef<'_>| !at.stream.values().is_empty();
        let several = traces.streams().filter(with_values).count() > 1;
        let mut any = false;
        for (number, (at, timeline)) in traces.streams().zip(&timelines).enumerate() {
            any |= with_values(&at);
            if !selection.takes(at) || !with_values(&at) {
                continue;
            }
            let pieces = selection.pieces(at, timeline, false);
            let prefix = match (several, at.stream.info().rank) {
                (false, _) => String::new(),
                (true, Some(rank)) => format!("rank{rank}/"),
                (true, None) => format!("process{number}/"),
            };
            let paths = paths(traces, at)?;
            values.read(at, &prefix, &paths, request, |ordinal| {
                pieces.step_of(ordinal).is_some()
            })?;
        }
        if !any {
            return Err(ReplayError::Selection(
                "the trace keeps no values (level T8): record with `optape record --watch 'MODULES:output' --keep values`".to_owned(),
            ));
        }
        if values.groups.is_empty() {
            return Err(ReplayError::Selection(format!(
                "the selection {selection} holds no kept value; `optape values TRACE` lists those that there are"
            )));
        }
        Ok(values)
    }

    fn read(
        &mut self,
        at: StreamRef<'a>,
        prefix: &str,
        paths: &HashMap<ModuleId, String>,
        request: &ValuesRequest,
        selected: impl Fn(u64) -> bool,
    ) -> Result<(), ReplayError> {
        let stream = self.streams.len();
        self.streams
            .push((at, KeptValues::of(at.trace, at.stream)));
        let dictionary = at.stream.dictionary();
        let mut places: HashMap<u32, Option<usize>> = HashMap::new();
        for value in at.trace.values(at.stream.id()) {
            let value = value.map_err(|e| self.traces.error(at.source, e))?;
            if !selected(value.ordinal.0) {
                continue;
            }
            let place = match places.get(&value.watch.0) {
                Some(place) => *place,
                None => {
                    let place = dictionary.watch(value.watch).and_then(|watch| {
                        let definition = watch.module.and_then(|id| dictionary.module(id));
                        let module = WatchedModule::of(
                            definition,
                            watch.module.and_then(|id| paths.get(&id)).map(String::as_str),
                        );
                        let (what, _) = place_of(&watch.what);
                        let asked = request.watches.is_empty()
                            || request
                                .watches
                                .iter()
                                .any(|one| one.what == what && one.takes(&module));
                        let inside = definition.is_none_or(|definition| {
                            request
                                .selection
                                .takes_names(&definition.name, &definition.classes)
                        });
                        (asked && inside).then(|| {
                            let path = module.shown();
                            self.groups.push(ValuesGroup {
                                name: if path.is_empty() {
                                    format!("{prefix}{}", watch.what)
                                } else {
                                    format!("{prefix}{path}/{}", watch.what)
                                },
                                module: definition.map(|d| d.name.clone()).unwrap_or_default(),
                                class: definition
                                    .and_then(|d| d.classes.first())
                                    .cloned()
                                    .unwrap_or_default(),
                                what: watch.what.clone(),
                                values: 0,
                                lost: 0,
                                dtypes: Vec::new(),
                                shapes: Vec::new(),
                                elements: 0,
                            });
                            self.entries.push(Vec::new());
                            self.groups.len() - 1
                        })
                    });
                    places.insert(value.watch.0, place);
                    place
                }
            };
            let Some(place) = place else { continue };
            let (Some(group), Some(entries)) =
                (self.groups.get_mut(place), self.entries.get_mut(place))
            else {
                continue;
            };
            if value.elements == Elements::Lost {
                group.lost += 1;
                continue;
            }
            group.values += 1;
            group.elements = group.elements.saturating_add(value.len());
            if !group.dtypes.contains(&value.dtype.name()) {
                group.dtypes.push(value.dtype.name());
            }
            if group.shapes.len() < SHAPES_SHOWN && !group.shapes.contains(&value.shape) {
                group.shapes.push(value.shape.clone());
            }
            entries.push(Entry {
                stream,
                ordinal: value.ordinal.0,
                dtype: value.dtype,
                shape: value.shape,
            });
        }
        Ok(())
    }

    /// What there is, in the order of the first value.
    #[must_use]
    pub fn groups(&self) -> &[ValuesGroup] {
        &self.groups
    }

    /// Values that were to be kept and are lost: they are in no file.
    #[must_use]
    pub fn lost(&self) -> u64 {
        self.groups.iter().map(|group| group.lost).sum()
    }

    fn arrays(&self, stacked: bool) -> Result<Vec<Array>, ReplayError> {
        let mut arrays = Vec::new();
        let mut names: BTreeMap<String, u64> = BTreeMap::new();
        for (group, entries) in self.groups.iter().zip(&self.entries) {
            // Two modules may have one path: a model that was made anew.
            let count = names.entry(group.name.clone()).or_default();
            let name = if *count == 0 {
                group.name.clone()
            } else {
                format!("{}~{count}", group.name)
            };
            *count += 1;
            if !stacked {
                for (at, entry) in entries.iter().enumerate() {
                    arrays.push(Array {
                        name: format!("{name}/{at}"),
                        dtype: entry.dtype,
                        shape: entry.shape.clone(),
                        parts: vec![entry.clone()],
                    });
                }
                continue;
            }
            let Some(first) = entries.first() else { continue };
            if let Some(other) = entries
                .iter()
                .find(|e| e.shape != first.shape || e.dtype != first.dtype)
            {
                return Err(ReplayError::Selection(format!(
                    "the values of {name} cannot be stacked: {} {:?} and {} {:?}; leave --stack away, or select with --step or --range",
                    first.dtype.name(),
                    first.shape,
                    other.dtype.name(),
                    other.shape
                )));
            }
            let mut shape = vec![entries.len() as u64];
            shape.extend(&first.shape);
            arrays.push(Array {
                name,
                dtype: first.dtype,
                shape,
                parts: entries.clone(),
            });
        }
        Ok(arrays)
    }

    fn value(&self, entry: &Entry) -> Result<Value, ReplayError> {
        let (at, kept) = self
            .streams
            .get(entry.stream)
            .ok_or_else(|| ReplayError::Selection("a stream is gone".to_owned()))?;
        kept.find(entry.ordinal)
            .map_err(|e| self.traces.error(at.source, e))?
            .ok_or_else(|| ReplayError::Selection("a value is gone".to_owned()))
    }

    /// Writes all values to a new file; gives the number of arrays.
    ///
    /// # Errors
    /// Where the file cannot be written, values cannot be stacked, or have a type that no file has.
    pub fn write(
        &self,
        path: &Path,
        format: ValuesFormat,
        stacked: bool,
    ) -> Result<usize, ReplayError> {
        let arrays = self.arrays(stacked)?;
        match format {
            ValuesFormat::Npz => {
                let file = File::create(path).map_err(|source| ReplayError::Io {
                    path: path.to_path_buf(),
                    source,
                })?;
                self.write_npz(&arrays, BufWriter::new(file))?;
            }
            ValuesFormat::Safetensors => self.write_safetensors(&arrays, path)?,
        }
        Ok(arrays.len())
    }

    fn write_npz<W: Write + Seek>(&self, arrays: &[Array], out: W) -> Result<(), ReplayError> {
        let mut zip = zip::ZipWriter::new(out);
        let options = zip::write::SimpleFileOptions::default()
            .compression_method(zip::CompressionMethod::Deflated)
            .large_file(true);
        for array in arrays {
            let kind = Npy::of(array.dtype).ok_or_else(|| no_type(array, "NumPy"))?;
            zip.start_file(format!("{}.npy", array.name), options)
                .map_err(io::Error::from)?;
            zip.write_all(&npy_head(kind.descr, &array.shape))?;
            for part in &array.parts {
                zip.write_all(&kind.bytes(&self.value(part)?))?;
            }
        }
        zip.finish().map_err(io::Error::from)?.flush()?;
        Ok(())
    }

    fn write_safetensors(&self, arrays: &[Array], path: &Path) -> Result<(), ReplayError> {
        let failure = RefCell::new(None);
        let views = arrays
            .iter()
            .map(|array| {
                let dtype = safetensors_dtype(array.dtype)
                    .ok_or_else(|| no_type(array, "safetensors"))?;
                let shape = array
                    .shape
                    .iter()
                    .map(|size| usize::try_from(*size).unwrap_or(usize::MAX))
                    .collect();
                let view = View {
                    values: self,
                    array,
                    dtype,
                    shape,
                    failure: &failure,
                };
                Ok((array.name.clone(), view))
            })
            .collect::<Result<Vec<_>, ReplayError>>()?;
        // One entry: their order would be another each time.
        let about = HashMap::from([("optape".to_owned(), env!("CARGO_PKG_VERSION").to_owned())]);
        let written = safetensors::serialize_to_file(views, Some(about), path);
        if let Some(error) = failure.take() {
            return Err(error);
        }
        written.map_err(|error| match error {
            safetensors::SafeTensorError::IoError(source) => ReplayError::Io {
                path: path.to_path_buf(),
                source,
            },
            other => ReplayError::Write(io::Error::other(other.to_string())),
        })
    }
}

/// An array that is read when it is written.
struct View<'v> {
    values: &'v Values<'v>,
    array: &'v Array,
    dtype: safetensors::Dtype,
    shape: Vec<usize>,
    failure: &'v RefCell<Option<ReplayError>>,
}

impl safetensors::View for View<'_> {
    fn dtype(&self) -> safetensors::Dtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        let mut bytes = Vec::with_capacity(self.data_len());
        for part in &self.array.parts {
            match self.values.value(part) {
                Ok(value) => bytes.extend_from_slice(&plain(&value)),
                Err(error) => {
                    self.failure.borrow_mut().get_or_insert(error);
                }
            }
        }
        bytes.resize(self.data_len(), 0);
        bytes.into()
    }

    fn data_len(&self) -> usize {
        let elements: usize = self.shape.iter().product();
        elements * self.array.dtype.bytes() as usize
    }
}

fn no_type(array: &Array, target: &str) -> ReplayError {
    ReplayError::Selection(format!(
        "{target} has no element type {}, which {} has; leave it out by naming others with --watch",
        array.dtype.name(),
        array.name
    ))
}

/// The elements as the dtype stores them.
fn plain(value: &Value) -> Cow<'_, [u8]> {
    match &value.elements {
        Elements::Raw(bytes) => Cow::Borrowed(bytes),
        Elements::Bits(bits) => {
            let one = one(value.dtype);
            let count = usize::try_from(value.len()).unwrap_or(0);
            let mut bytes = vec![0; count * one.len()];
            for (at, element) in bytes.chunks_mut(one.len().max(1)).enumerate() {
                if bits.get(at / 8).is_some_and(|byte| byte >> (at % 8) & 1 == 1) {
                    element.copy_from_slice(one);
                }
            }
            Cow::Owned(bytes)
        }
        Elements::Lost => Cow::Borrowed(&[]),
    }
}

/// A one, as a dtype that can be packed stores it.
fn one(dtype: DType) -> &'static [u8] {
    match dtype.name() {
        "int16" | "uint16" => &[1, 0],
        "int32" | "uint32" => &[1, 0, 0, 0],
        "int64" | "uint64" => &[1, 0, 0, 0, 0, 0, 0, 0],
        "float16" => &[0, 0x3c],
        "bfloat16" => &[0x80, 0x3f],
        "float32" => &[0, 0, 0x80, 0x3f],
        "float64" => &[0, 0, 0, 0, 0, 0, 0xf0, 0x3f],
        _ => &[1],
    }
}

/// How NumPy stores a type.
#[derive(Clone, Copy)]
struct Npy {
    descr: &'static str,
    /// It has no such type: elements become float32.
    widened: bool,
}

impl Npy {
    fn of(dtype: DType) -> Option<Self> {
        let same = |descr| {
            Some(Self {
                descr,
                widened: false,
            })
        };
        match dtype.name() {
            "bool" => same("|b1"),
            "uint8" => same("|u1"),
            "int8" => same("|i1"),
            "int16" => same("<i2"),
            "uint16" => same("<u2"),
            "int32" => same("<i4"),
            "uint32" => same("<u4"),
            "int64" => same("<i8"),
            "uint64" => same("<u8"),
            "float16" => same("<f2"),
            "float32" => same("<f4"),
            "float64" => same("<f8"),
            "complex64" => same("<c8"),
            "complex128" => same("<c16"),
            "bfloat16" => Some(Self {
                descr: "<f4",
                widened: true,
            }),
            _ => None,
        }
    }

    fn bytes(self, value: &Value) -> Cow<'_, [u8]> {
        if !self.widened {
            return plain(value);
        }
        // The bits of a bfloat16 are the upper half of those of a float32.
        plain(value)
            .chunks(2)
            .flat_map(|half| [0, 0].into_iter().chain(half.iter().copied()))
            .collect::<Vec<u8>>()
            .into()
    }
}

/// The head of an array file, version 1.0: a dictionary in Python's notation, filled up so that the data is aligned to 64 bytes.
fn npy_head(descr: &str, shape: &[u64]) -> Vec<u8> {
    let sizes: Vec<String> = shape.iter().map(ToString::to_string).collect();
    let tuple = match sizes.as_slice() {
        [one] => format!("({one},)"),
        sizes => format!("({})", sizes.join(", ")),
    };
    let mut head = format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': {tuple}, }}");
    const BEFORE: usize = 10;
    let filled = (BEFORE + head.len() + 1).next_multiple_of(64) - BEFORE - 1;
    while head.len() < filled {
        head.push(' ');
    }
    head.push('\n');
    let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
    let length = u16::try_from(head.len()).unwrap_or(u16::MAX);
    bytes.extend(length.to_le_bytes());
    bytes.extend(head.into_bytes());
    bytes
}

fn safetensors_dtype(dtype: DType) -> Option<safetensors::Dtype> {
    use safetensors::Dtype;
    Some(match dtype.name() {
        "bool" => Dtype::BOOL,
        "uint8" => Dtype::U8,
        "int8" => Dtype::I8,
        "int16" => Dtype::I16,
        "uint16" => Dtype::U16,
        "int32" => Dtype::I32,
        "uint32" => Dtype::U32,
        "int64" => Dtype::I64,
        "uint64" => Dtype::U64,
        "float16" => Dtype::F16,
        "bfloat16" => Dtype::BF16,
        "float32" => Dtype::F32,
        "float64" => Dtype::F64,
        "complex64" => Dtype::C64,
        "float8_e4m3fn" => Dtype::F8_E4M3,
        "float8_e5m2" => Dtype::F8_E5M2,
        "float8_e8m0fnu" => Dtype::F8_E8M0,
        _ => return None,
    })
}

/// Paths of modules below the root that has most modules, from what the stream says of children and calls.
fn paths(
    traces: &Traces,
    at: StreamRef<'_>,
) -> Result<HashMap<ModuleId, String>, ReplayError> {
    let dictionary = at.stream.dictionary();
    let mut world = crate::ordered::World::new(dictionary);
    let mut depth: HashMap<ThreadId, u64> = HashMap::new();
    for (index, entry) in at.stream.blocks().iter().enumerate() {
        if entry.op_calls == entry.records {
            continue;
        }
        let block = at
            .trace
            .block(at.stream.id(), index, Columns::MOMENTS | Columns::KINDS)
            .map_err(|e| traces.error(at.source, e))?;
        for moment in &block.moments {
            let depth = depth.entry(moment.thread).or_default();
            match &moment.event {
                Event::ModuleEnter { module, .. } => {
                    if *depth == 0 {
                        world.root(*module);
                    }
                    *depth += 1;
                }
                Event::ModuleExit { .. } => *depth = depth.saturating_sub(1),
                Event::Fact {
                    module: Some(module),
                    key,
                    value,
                } => {
                    if let Some(key) = dictionary.text(*key) {
                        world.fact(*module, key, value);
                    }
                }
                _ => {}
            }
        }
    }
    let paths = crate::watched::Paths::of(&world);
    Ok(dictionary
        .modules()
        .map(|(id, module)| (id, paths.path(id, &module.name)))
        .collect())
}
