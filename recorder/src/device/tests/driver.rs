//! The driver's side of times, against a stand-in that keeps to the driver's rules: which calls are made, in which state of the thread. What a
//! real driver and a real GPU do is not seen here.

use std::path::Path;
use std::process::Command;

use libloading::os::unix::Library;

use super::super::driver::{EventPairs, current_device};
use super::super::timing::Stopwatch;
use super::super::{Clock, Streams};

/// What the stand-in does.
#[repr(C)]
#[derive(Debug)]
struct Script {
    now: u64,
    delay: u64,
    device_ns: u64,
    somebody_captures: i32,
    refuses: i32,
}

struct Fake {
    library: Library,
}

impl Fake {
    /// Compiles both libraries and loads them under the names that the driver's are looked for by; `None` where there is no C++ compiler.
    fn load() -> Option<Self> {
        let compiler = std::env::var("CXX").unwrap_or_else(|_| "g++".to_owned());
        let directory = tempfile::tempdir().unwrap();
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/device/tests/fake_driver.cpp");
        let mut loaded = Vec::new();
        for (name, flag) in [
            ("libtorch_cuda.so", "-DOPTAPE_TORCH"),
            ("libcuda.so.1", "-DOPTAPE_DRIVER"),
        ] {
            let path = directory.path().join(name);
            let output = Command::new(&compiler)
                .args([
                    "-std=c++17",
                    "-Wall",
                    "-Wextra",
                    "-Werror",
                    "-shared",
                    "-fPIC",
                ])
                .args([flag, &format!("-Wl,-soname,{name}")])
                .arg(&source)
                .arg("-o")
                .arg(&path)
                .output();
            let output = match output {
                Ok(output) => output,
                Err(error) => {
                    println!("NOT RUN: no C++ compiler ({compiler}: {error})");
                    return None;
                }
            };
            let said = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{said}");
            // SAFETY: a library that was just built, without initializers. Found by its name from now on.
            loaded.push(unsafe { Library::open(Some(&path), 2) }.unwrap());
        }
        let library = loaded.pop()?;
        // Neither is unloaded: pointers into them are kept.
        std::mem::forget(loaded);
        Some(Self { library })
    }

    fn script(&self) -> &'static mut Script {
        // SAFETY: the type of `fake_driver.cpp`; only this test uses it, one reference at a time.
        unsafe {
            let script = self
                .library
                .get::<unsafe extern "C" fn() -> *mut Script>(b"fake_script")
                .unwrap();
            &mut *script()
        }
    }

    fn number(&self, name: &str) -> i32 {
        // SAFETY: a function of `fake_driver.cpp` without arguments.
        unsafe {
            let function = self
                .library
                .get::<unsafe extern "C" fn() -> i32>(name.as_bytes())
                .unwrap();
            function()
        }
    }

    fn context(&self, on: bool) {
        // SAFETY: a function of `fake_driver.cpp`.
        unsafe {
            let function = self
                .library
                .get::<unsafe extern "C" fn(i32)>(b"fake_context")
                .unwrap();
            function(on.into());
        }
    }
}

#[test]
fn pairs_of_events() {
    let Some(fake) = Fake::load() else { return };
    assert_eq!(current_device(), None, "this thread has no context");
    // Another thread captures a graph from here on.
    fake.script().somebody_captures = 1;
    let mut clock = EventPairs::open(0, 3).unwrap();
    assert_eq!(clock.name(), "Stand-in (sm_90)");
    assert_eq!(fake.number("fake_events"), 6);
    let stream = clock.current_stream().unwrap();
    assert_eq!((stream.handle, stream.id), (0x57, 0x58));
    assert!(!clock.is_capturing(stream));

    // With the context that torch has made current, and without any.
    for (pair, context) in [(0, true), (1, false)] {
        fake.context(context);
        fake.script().delay = 1;
        clock.begin(pair, stream).unwrap();
        fake.script().device_ns += 2_500_000;
        clock.end(pair, stream).unwrap();
        assert_eq!(clock.elapsed(pair).unwrap(), None);
        fake.script().now += 1;
        assert_eq!(clock.elapsed(pair).unwrap(), Some(2_500_000));
        assert_eq!(current_device(), context.then_some(0));
        assert_eq!(
            fake.number("fake_mode"),
            0,
            "the thread's mode is as it was"
        );
    }
    // Used again, a pair says nothing of what it was used for before.
    clock.begin(0, stream).unwrap();
    clock.end(0, stream).unwrap();
    assert_eq!(clock.elapsed(0).unwrap(), None);
    fake.script().now += 1;
    assert_eq!(clock.elapsed(0).unwrap(), Some(0));
    assert!(clock.begin(3, stream).is_err(), "there are three");

    // As it is used: no event is made any more, and what fails is told by name.
    let mut watch = Stopwatch::new(Box::new(clock), 3);
    for record in 0..10 {
        let span = watch.begin().unwrap();
        fake.script().device_ns += 1000 * record;
        watch.end(span).unwrap();
        watch.written(span, Some(record));
        fake.script().now += 1;
        let mut times = Vec::new();
        watch.arrived(true, |record, ns| times.push((record, ns)));
        let [(of, ns)] = times[..] else {
            panic!("{times:?}")
        };
        // A float of milliseconds.
        assert!(of == record && ns.abs_diff(1000 * record) <= 1, "{ns}");
    }
    assert_eq!(fake.number("fake_events"), 6);
    fake.script().refuses = 1;
    assert!(watch.begin().is_err());
    assert_eq!(
        watch.broken(),
        Some("cuEventRecord: CUDA_ERROR_INVALID_CONTEXT")
    );
    // A GPU that torch does not have.
    assert!(EventPairs::open(1, 1).is_ok_and(|clock| clock.current_stream().is_none()));
}
