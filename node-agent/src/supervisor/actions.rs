//! What the watchdog asks for, done: fetch, set memory aside, start and end workers.

use std::ffi::OsString;
use std::time::Duration;

use freehold_crds::{Device, KvType, Precision};
use freehold_rules::plan::memory::{context_length, estimate, kv_cache_tokens};
use freehold_rules::supervise::{Action, Event, Stage};
use tokio::sync::watch;
use tokio_util::task::AbortOnDropHandle;
use tracing::info;

use super::memory::{Admission, Holding, admit};
use super::process::{Launch, WorkerProcess};
use super::{Message, Supervisor, run_dir};
use crate::store::FetchState;

impl Supervisor {
    pub(super) fn act(&mut self, name: &str, now: Duration, action: Action) {
        match action {
            Action::Fetch => self.fetch(name),
            Action::Reserve => self.reserve(name, now),
            Action::Load => self.load(name, now),
            Action::Stop => self.with_worker(name, WorkerProcess::stop),
            Action::Kill => self.with_worker(name, WorkerProcess::kill),
            Action::Release => self.release(name),
        }
    }

    fn with_worker(&self, name: &str, order: impl Fn(&WorkerProcess)) {
        if let Some(worker) = self
            .instances
            .get(name)
            .and_then(|instance| instance.worker.as_ref())
        {
            order(worker);
        }
    }

    fn release(&mut self, name: &str) {
        if let Some(instance) = self.instances.get_mut(name)
            && instance.reserved_bytes.take().is_some()
        {
            self.memory_changed = true;
        }
    }

    /// Fetches beside the supervisor; dropping the handle ends it.
    fn fetch(&mut self, name: &str) {
        let epoch = self.next_epoch();
        let Some(instance) = self.instances.get_mut(name) else {
            return;
        };
        let (store, source) = (self.tools.store.clone(), instance.assignment.model.clone());
        let (messages, assignment) = (self.messages.clone(), name.to_owned());
        let task = tokio::spawn(async move {
            let (sender, mut states) = watch::channel(FetchState::default());
            let mut fetch = std::pin::pin!(store.ensure(&source, sender));
            let result = loop {
                // The fetch is only polled further, a state that is skipped is followed by a later one.
                tokio::select! {
                    result = &mut fetch => break result,
                    Ok(()) = states.changed() => {
                        let state = states.borrow_and_update().clone();
                        let assignment = assignment.clone();
                        let _ = messages.send(Message::FetchProgress { assignment, epoch, state }).await;
                    }
                }
            };
            let _ = messages
                .send(Message::FetchEnded {
                    assignment,
                    epoch,
                    result,
                })
                .await;
        });
        instance.fetch_begins(epoch, AbortOnDropHandle::new(task));
    }

    fn reserve(&mut self, name: &str, now: Duration) {
        let Some(instance) = self.instances.get(name) else {
            return;
        };
        let Some(model) = &instance.stored else { return };
        // A plan that set memory aside has said how much, the owner's own figure included.
        let planned = Some(instance.assignment.memory_bytes).filter(|bytes| *bytes > 0);
        let need = estimate(&model.facts, &instance.assignment.engine, planned);
        let holdings: Vec<_> = self
            .instances
            .iter()
            .filter(|(other, _)| *other != name)
            .filter_map(|(other, instance)| {
                let leaving = matches!(
                    instance.watchdog.stage(),
                    Stage::Draining { .. } | Stage::Stopping { .. }
                );
                let idle = self.tools.gateway.activity(other).in_flight == 0;
                let idle_ms = instance.sleeps_if_asked().filter(|_| idle);
                Some(Holding {
                    name: other.clone(),
                    bytes: instance.reserved_bytes?,
                    leaving,
                    idle_ms: idle_ms.map(|last| now.saturating_sub(last).as_millis()),
                })
            })
            .collect();
        match admit(
            need.total_bytes,
            &need.arithmetic,
            self.tools.allocatable_bytes,
            &holdings,
        ) {
            Admission::Admitted => {
                if let Some(instance) = self.instances.get_mut(name) {
                    instance.reserved_bytes = Some(need.total_bytes);
                }
                self.step(name, now, Event::Reserved);
            }
            Admission::Wait { message, evict } => {
                self.step(
                    name,
                    now,
                    Event::NoMemory {
                        message,
                        freeing: true,
                    },
                );
                for sleeper in evict {
                    info!(assignment = %sleeper, wanted_by = name, "Sending an idle model to sleep");
                    self.step(&sleeper, now, Event::Evict);
                }
            }
            Admission::Refused { message } => {
                info!(assignment = name, message, "No memory for the model");
                self.step(
                    name,
                    now,
                    Event::NoMemory {
                        message,
                        freeing: false,
                    },
                );
            }
        }
    }

    fn load(&mut self, name: &str, now: Duration) {
        let epoch = self.next_epoch();
        let Some(instance) = self.instances.get_mut(name) else {
            return;
        };
        let Some(model) = &instance.stored else { return };
        let engine = &instance.assignment.engine;
        let socket = run_dir::socket(&self.tools.run_dir, name, epoch);
        let mut arguments: Vec<OsString> = self
            .tools
            .worker_arguments_prefix
            .iter()
            .map(OsString::from)
            .collect();
        let mut option = |flag: &str, value: OsString| arguments.extend([OsString::from(flag), value]);
        option("--socket", socket.clone().into());
        option("--model", model.path.clone().into());
        option(
            "--context",
            context_length(model.facts.context_length, engine)
                .to_string()
                .into(),
        );
        option("--concurrency", engine.concurrency.to_string().into());
        option("--queue", engine.queue.to_string().into());
        option("--device", device_argument(instance.assignment.device).into());
        option(
            "--kv",
            match engine.kv_type {
                KvType::F16 => "f16",
                KvType::F32 => "f32",
                KvType::Q8 => "q8",
            }
            .into(),
        );
        if engine.precision == Precision::High {
            option("--precision", "high".into());
        }
        if engine.kv_cache_tokens.is_some() {
            let context = context_length(model.facts.context_length, engine);
            option("--kv-tokens", kv_cache_tokens(context, engine).to_string().into());
        }
        if !engine.prefix_cache {
            option("--prefix-tokens", "0".into());
        }
        if !engine.speculation {
            option("--speculate", "false".into());
        }
        if let Some(draft) = &engine.draft {
            option("--draft", draft.path.clone().into());
            if let Some(sha256) = &draft.sha256 {
                option("--draft-sha256", sha256.into());
            }
        }
        if let Some(threads) = engine.threads {
            option("--threads", threads.to_string().into());
        }
        // A GPU that has no room for the model is left to the worker to find out: it falls back and says so.
        let program = match (&self.tools.gpu_worker, instance.assignment.device) {
            (None, _) | (Some(_), Device::Cpu) => &self.tools.worker_program,
            (Some(program), Device::Auto | Device::Cuda | Device::Metal) => program,
        };
        let launch = Launch {
            assignment: name.to_owned(),
            epoch,
            program: program.clone(),
            arguments,
            environment: crate::worker::environment(engine.threads),
            socket,
        };
        instance.worker_begins(WorkerProcess::start(launch, self.messages.clone()), now);
    }
}

fn device_argument(device: Device) -> &'static str {
    match device {
        Device::Auto => "auto",
        Device::Cpu => "cpu",
        Device::Cuda => "cuda",
        Device::Metal => "metal",
    }
}
