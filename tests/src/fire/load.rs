//! The programs of one node. A life ends with the node, or with the run; then the oracles settle what was in doubt, and
//! the next life goes on from there.

use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use super::Dice;
use super::counter::Counter;
use super::latest::Latest;
use super::register::Register;

/// Pause between two steps: the programs share the machine with the nodes.
const PACE: Duration = Duration::from_millis(4);

/// The programs of one node and what they were promised.
#[derive(Debug)]
pub(super) struct Load {
    number: usize,
    mount: PathBuf,
    register: Arc<Register>,
    latest: Arc<Latest>,
    counter: Arc<Counter>,
    /// Steps of each program, over all lives.
    steps: Arc<[AtomicU64; 3]>,
    life: u64,
    running: Option<Life>,
}

#[derive(Debug)]
struct Life {
    stop: Arc<AtomicBool>,
    /// The first error of a program.
    error: Arc<Mutex<Option<String>>>,
    threads: Vec<JoinHandle<()>>,
}

impl Load {
    pub(super) fn new(number: usize, mount: PathBuf, counter: Arc<Counter>) -> Self {
        Self {
            number,
            mount,
            register: Arc::new(Register::new(number as u64)),
            latest: Arc::default(),
            counter,
            steps: Arc::default(),
            life: 0,
            running: None,
        }
    }

    /// Begins the next life.
    pub(super) fn begin(&mut self, seed: u64) {
        self.life += 1;
        let (stop, error) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(None)));
        let (register, latest, counter) = (self.register.clone(), self.latest.clone(), self.counter.clone());
        let (register_path, latest_path) = (self.register_path(), self.latest_path());
        let counter_path = self.mount.join("counter");
        let (life, mut dice, mut file) = (self.life, Dice::new(seed), None);
        let write = move || {
            let file = match &mut file {
                Some(file) => file,
                empty => {
                    let mut options = File::options();
                    let options = options.read(true).write(true).create(true).truncate(false);
                    empty.insert(options.open(&register_path)?)
                }
            };
            register.step(file, life, &mut dice)
        };
        let programs: [Box<dyn FnMut() -> io::Result<()> + Send>; 3] = [
            Box::new(write),
            Box::new(move || latest.step(&latest_path)),
            Box::new(move || counter.step(&counter_path)),
        ];
        let mut threads = Vec::new();
        for (index, mut program) in programs.into_iter().enumerate() {
            let (stop, error, steps) = (Arc::clone(&stop), Arc::clone(&error), Arc::clone(&self.steps));
            threads.push(std::thread::spawn(move || {
                while !stop.load(Ordering::Acquire) {
                    if let Err(failed) = program() {
                        let what = format!("{}: {failed}", ["register", "latest", "counter"][index]);
                        error.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(what);
                        return;
                    }
                    steps[index].fetch_add(1, Ordering::Release);
                    std::thread::park_timeout(PACE);
                }
            }));
        }
        self.running = Some(Life { stop, error, threads });
    }

    /// The error that a program of this life has met.
    pub(super) fn error(&self) -> Option<String> {
        let life = self.running.as_ref()?;
        life.error.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// How far the programs have come.
    pub(super) fn steps(&self) -> [u64; 3] {
        [0, 1, 2].map(|index| self.steps[index].load(Ordering::Acquire))
    }

    /// Ends this life and waits for its programs. Gives the error that one of them has met.
    pub(super) fn end(&mut self) -> Option<String> {
        let life = self.running.take()?;
        life.stop.store(true, Ordering::Release);
        for thread in life.threads {
            if thread.join().is_err() {
                return Some("LOST: a program of the load panicked".to_owned());
            }
        }
        life.error.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Asks the oracles of this node's files, as node `through` shows them.
    pub(super) fn check(&self, through: &std::path::Path) -> Result<(), String> {
        let (register, latest) = (self.name_in(through, "register"), self.name_in(through, "latest"));
        let found = self.register.check(&register).and_then(|()| self.latest.check(&latest));
        found.and_then(|()| self.counter.check(&through.join("counter"))).map_err(|error| self.told(&error))
    }

    /// This node's programs are dead: what was in doubt is decided by what `through` shows.
    pub(super) fn settle(&self, through: &std::path::Path) -> Result<(), String> {
        let (register, latest) = (self.name_in(through, "register"), self.name_in(through, "latest"));
        let settled = self.register.settle(&register).and_then(|()| self.latest.settle(&latest));
        settled.map_err(|error| self.told(&error))
    }

    fn told(&self, error: &io::Error) -> String {
        format!("files of node {}: {error}", self.number)
    }

    fn register_path(&self) -> PathBuf {
        self.name_in(&self.mount, "register")
    }

    fn latest_path(&self) -> PathBuf {
        self.name_in(&self.mount, "latest")
    }

    fn name_in(&self, mount: &std::path::Path, what: &str) -> PathBuf {
        mount.join(format!("{what}-{}", self.number))
    }
}
